"""Finding the server and who we are: every way a kubeconfig has, and every mistake in it, each with the next move."""

import base64
import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import kubernetes.config  # noqa: F401 -- here, so that no test is measured by what this takes
import pytest
import yaml
from api_server import ApiServer

from dtrain.errors import ClusterError
from dtrain.kubernetes import kubeconfig
from dtrain.kubernetes.client import POD, Client


@pytest.fixture(autouse=True)
def nobody_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)


def can_list(path: Path | str, context: str | None = None) -> bool:
    with Client(kubeconfig.find(str(path), context)) as mine:
        return mine.list(POD, "dtrain")[0] == []


def error_of(path: Path | str | None, context: str | None = None) -> str:
    started = time.monotonic()
    with pytest.raises(ClusterError) as error, Client(kubeconfig.find(path and str(path), context)) as mine:
        mine.list(POD, "dtrain")
    assert time.monotonic() - started < 5.0
    assert "; " in error.value.message  # the next move
    return error.value.message


def script(path: Path, text: str) -> dict:
    """An exec plugin, as GKE, EKS and AKS have one."""
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(0o755)
    return {"apiVersion": "client.authentication.k8s.io/v1", "command": f"./{path.name}", "interactiveMode": "Never"}


# -- where it is looked for --------------------------------------------------------------------------------------


def test_no_kubeconfig_at_all() -> None:
    text = error_of(None)
    assert text.startswith("there is no kubeconfig: neither $KUBECONFIG nor ~/.kube/config; get one from")
    assert "gcloud container clusters get-credentials" in text


def test_without_the_official_client(api: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kubernetes", None)  # as where it is not installed
    assert error_of(api.kubeconfig(tmp_path / "k")).endswith("; run: pip install 'dtrain[kubernetes]'")


def test_a_path_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert error_of(tmp_path / "nothing").startswith(f"{tmp_path / 'nothing'}: there is no kubeconfig here; get one")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "nothing"))
    assert error_of(None).startswith(f"$KUBECONFIG names {tmp_path / 'nothing'}, which is not there")


def test_home_and_the_environment(api: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home" / ".kube").mkdir(parents=True)
    api.kubeconfig(tmp_path / "home" / ".kube" / "config", context="at_home")
    assert kubeconfig.find(None, None).source.startswith("context at_home of ")
    monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(tmp_path / "other", context="elsewhere")))
    assert kubeconfig.find(None, None).source.startswith("context elsewhere of ")


def test_files_are_merged_and_the_first_counts(api: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = api.kubeconfig(tmp_path / "first", context="a")
    second = api.kubeconfig(tmp_path / "second", context="b", token="nobody's")
    monkeypatch.setenv("KUBECONFIG", os.pathsep.join([str(first), str(tmp_path / "gone"), str(second)]))
    for context in (None, "a", "b"):  # both name their user alike
        with Client(kubeconfig.find(None, context)) as mine:
            assert mine.list(POD, "dtrain")[0] == []


def test_a_context_that_is_not_there(api: ApiServer, tmp_path: Path) -> None:
    path = api.kubeconfig(tmp_path / "k", context="gke_h100")
    text = error_of(path, "gke_h10")
    assert text.endswith("backend.context is 'gke_h10', which it does not have; there is: gke_h100")
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "current-context": "old"}))
    assert "current-context is 'old', which it does not have; there is: gke_h100" in error_of(path)
    path.write_text(json.dumps({**config, "current-context": ""}))
    assert "no context is chosen; set backend.context to one of gke_h100" in error_of(path)


CONTEXT = "current-context: a\ncontexts: [{name: a, context: {cluster: c, user: u}}]\n"
SERVER = "users: [{name: u, user: {}}]\nclusters: [{name: c, cluster: {server: somewhere}}]"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "this kubeconfig cannot be read"),
        ("- a\n", "this kubeconfig cannot be read"),
        (CONTEXT, "it cannot be used (Invalid kube-config file. Expected object with name c in "),
        (CONTEXT + SERVER, "its server 'somewhere' is no address"),
    ],
)
def test_files_that_are_broken(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "k").write_text(text)
    assert told in error_of(tmp_path / "k")


def test_in_a_pod(api: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host, _, port = api.url.removeprefix("https://").partition(":")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", host)
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", port)
    monkeypatch.setattr(kubeconfig, "ACCOUNT", tmp_path)  # where a kubelet would put it
    (tmp_path / "token").write_text(api.token + "\n")
    assert api.authority is not None
    (tmp_path / "ca.crt").write_bytes(base64.b64decode(api.authority.certificate_base64))
    with Client(kubeconfig.find(None, None)) as mine:
        assert mine.list(POD, "dtrain")[0] == []


# -- who we are --------------------------------------------------------------------------------------------------


def test_a_client_certificate(api: ApiServer, tmp_path: Path) -> None:
    assert api.authority is not None
    api.user("by certificate", [("list", "", "pods")])
    assert can_list(api.kubeconfig(tmp_path / "k", **api.authority.client("by certificate")))
    text = error_of(api.kubeconfig(tmp_path / "k2", **{"client-certificate-data": "!", "client-key-data": "!"}))
    assert "speaks no TLS as expected" in text
    assert text.endswith("check its server address, and the certificates in the kubeconfig")


def test_files_beside_the_kubeconfig(api: ApiServer, tmp_path: Path) -> None:
    """Relative paths start at the kubeconfig, wherever the command is given."""
    assert api.authority is not None
    path = api.kubeconfig(tmp_path / "k", tokenFile="token.txt")
    (tmp_path / "token.txt").write_text(f"{api.token}\n")
    config = json.loads(path.read_text())
    data = config["clusters"][0]["cluster"].pop("certificate-authority-data")
    (tmp_path / "ca.crt").write_bytes(base64.b64decode(data))
    config["clusters"][0]["cluster"]["certificate-authority"] = "ca.crt"
    path.write_text(yaml.safe_dump(config))
    assert can_list(path)
    (tmp_path / "token.txt").unlink()
    assert "token.txt" in error_of(api.kubeconfig(tmp_path / "k2", tokenFile="token.txt"))


def test_a_login_command(api: ApiServer, tmp_path: Path) -> None:
    """It is told the server, asked once, and asked again when what it gave has run out or is refused."""
    text = f"""
import json, os, pathlib
asked = pathlib.Path({str(tmp_path / "asked")!r})
asked.write_text(asked.read_text() + "x" if asked.exists() else "x")
info = json.loads(os.environ["KUBERNETES_EXEC_INFO"])
assert info["kind"] == "ExecCredential" and info["spec"]["interactive"] is False, info
assert info["spec"]["cluster"]["server"] == {api.url!r} and os.environ["TEAM"] == "a"
token = pathlib.Path({str(tmp_path / "token")!r}).read_text()
status = {{"token": token, "expirationTimestamp": "2999-01-01T00:00:00Z"}}
print(json.dumps({{"apiVersion": info["apiVersion"], "kind": "ExecCredential", "status": status}}))
"""
    plugin = {**script(tmp_path / "login", text), "env": [{"name": "TEAM", "value": "a"}], "provideClusterInfo": True}
    path = api.kubeconfig(tmp_path / "k", exec=plugin)
    first = api.user("me", [("list", "", "pods")])
    (tmp_path / "token").write_text(first)
    assert can_list(path)
    assert can_list(path)
    assert (tmp_path / "asked").read_text() == "x"
    api.expire(first)
    (tmp_path / "token").write_text(api.user("me", [("list", "", "pods")]))
    assert can_list(path)  # refused once, asked again, and let in
    assert (tmp_path / "asked").read_text() == "xx"


def test_credentials_that_have_run_out(api: ApiServer, tmp_path: Path) -> None:
    token = api.user("me")
    api.expire(token)
    text = error_of(api.kubeconfig(tmp_path / "k", token=token))
    assert text.endswith("the cluster does not accept these credentials, they may have run out; get a new kubeconfig")
    told = {"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": {"token": "old"}}
    plugin = script(tmp_path / "gke-gcloud-auth-plugin", f"import json; print(json.dumps({told}))")
    assert error_of(api.kubeconfig(tmp_path / "k2", exec=plugin)).endswith("; gcloud auth login")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("import sys; sys.exit('You do not currently have an active account selected.')",
         "aws failed (exec: process returned 1. You do not currently have an active account selected.); try: aws sso"),
        ("print('welcome')", "aws failed (exec: failed to decode process output: "),
    ],
    ids=["fails", "babbles"],
)  # fmt: skip
def test_login_commands_that_fail(api: ApiServer, tmp_path: Path, text: str, told: str) -> None:
    assert told in error_of(api.kubeconfig(tmp_path / "k", exec=script(tmp_path / "aws", text)))
    assert api.requests == []  # nobody goes on without credentials


def test_a_login_command_on_a_terminal(api: ApiServer, tmp_path: Path) -> None:
    """It talks to whoever sits there by itself."""
    path = api.kubeconfig(tmp_path / "k", exec=script(tmp_path / "aws", "import sys; sys.exit('Your session is over')"))
    code = f"from dtrain.kubernetes import kubeconfig; kubeconfig.find({str(path)!r}, None)"
    near, far = os.openpty()
    try:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, stdout=far, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    finally:
        os.close(near)
        os.close(far)
    assert done.stderr.startswith("Your session is over")
    assert "its login command ./aws failed (see above what it says); try: aws sso login" in done.stderr


def test_a_login_command_that_is_not_installed(api: ApiServer, tmp_path: Path) -> None:
    plugin = {
        "apiVersion": "client.authentication.k8s.io/v1",
        "command": "no-such-plugin",
        "installHint": "see https://example.com/\n  install",
    }
    text = error_of(api.kubeconfig(tmp_path / "k", exec=plugin))
    assert text.endswith("its login command no-such-plugin is not installed; see https://example.com/ install")


WAITS = """
import pathlib, subprocess, sys, time
inner = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pathlib.Path(sys.argv[0] + ".pid").write_text(str(inner.pid))
inner.wait()
"""


def _is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z")
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("when", ["first", "renewed"])
def test_a_login_command_that_never_ends(
    api: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, when: str
) -> None:
    """It waits for somebody who is not there; neither it nor what it has started is left behind."""
    status = {"token": api.user("me", [("list", "", "pods")]), "expirationTimestamp": "2001-01-01T00:00:00Z"}
    told = {"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": status}
    plugin = script(tmp_path / "kubelogin", f"import json; print(json.dumps({told}))" if when == "renewed" else WAITS)
    path = api.kubeconfig(tmp_path / "k", exec=plugin)
    if when == "renewed":
        assert can_list(path)
        script(tmp_path / "kubelogin", WAITS)
    monkeypatch.setattr(kubeconfig, "LOGIN_S", 1.0)
    text = error_of(path)
    assert text == (
        f"context loopback of {path}: its login has not ended after 1 s; run kubectl by hand to see what it waits for,"
        " then az login"
    )
    inner = int((tmp_path / "kubelogin.pid").read_text())
    deadline = time.monotonic() + 5
    while not _is_gone(inner):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not any(thread.name == "login" for thread in threading.enumerate())
    assert capfd.readouterr().err == ""


def test_a_login_of_an_old_kind(api: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library knows some of these; where they have nothing to offer the file is named."""
    monkeypatch.setenv("NO_GCE_CHECK", "true")  # this machine is not asked whether it is one of Google's
    path = api.kubeconfig(tmp_path / "k", **{"auth-provider": {"name": "gcp"}})
    assert error_of(path).startswith(f"context loopback of {path}: it cannot be used (")


def test_in_the_name_of_another(api: ApiServer, tmp_path: Path) -> None:
    """Whoever asks to be less than he is must not be more."""
    access = kubeconfig.find(str(api.kubeconfig(tmp_path / "k", **{"token": api.token, "as": "viewer"})), None)
    assert access.headers(access.connect())["Impersonate-User"] == "viewer"


def test_a_server_whose_certificate_is_not_looked_at(api: ApiServer, tmp_path: Path) -> None:
    path = api.kubeconfig(tmp_path / "k")
    config = json.loads(path.read_text())
    config["clusters"][0]["cluster"] = {"server": api.url, "insecure-skip-tls-verify": True}
    path.write_text(json.dumps(config))
    assert can_list(path)
    config["clusters"][0]["cluster"]["proxy-url"] = "socks5://localhost:1080"
    path.write_text(json.dumps(config))
    assert "the proxy socks5://localhost:1080 is not of the http:// kind" in error_of(path)


def test_a_certificate_for_another_name(api: ApiServer, tmp_path: Path) -> None:
    path = api.kubeconfig(tmp_path / "k")
    config = json.loads(path.read_text())
    config["clusters"][0]["cluster"]["tls-server-name"] = "kubernetes.example.com"
    path.write_text(json.dumps(config))
    assert "shows a certificate that is not trusted (Hostname mismatch" in error_of(path)


class Proxy(threading.Thread):
    """Passes connections on, as a company's proxy does, and notes to where."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def run(self) -> None:
        with self._listener, self._listener.accept()[0] as near:
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += near.recv(1)
            target = head.split()[1].decode()
            self.asked.append(target)
            host, _, port = target.partition(":")
            with socket.create_connection((host, int(port))) as far:
                near.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                while True:
                    for end in select.select([near, far], [], [])[0]:
                        data = end.recv(1 << 16)
                        if not data:
                            return
                        (far if end is near else near).sendall(data)


@pytest.mark.parametrize("how", ["kubeconfig", "environment"])
def test_through_a_proxy(api: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    proxy = Proxy()
    proxy.start()
    path = api.kubeconfig(tmp_path / "k")
    if how == "environment":
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        monkeypatch.setenv("NO_PROXY", "elsewhere")
    else:
        config = json.loads(path.read_text())
        config["clusters"][0]["cluster"]["proxy-url"] = proxy.url
        path.write_text(json.dumps(config))
    assert can_list(path)
    proxy.join()
    assert proxy.asked == [api.url.removeprefix("https://")]
