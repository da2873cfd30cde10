"""Where the API server is and who we are: a kubeconfig as kubectl reads it, or a pod's own account.

Credentials come from what the file names and are never written anywhere: tokens, certificates, or a command (an exec
plugin, as GKE, EKS and AKS use) that is asked again once they have run out.
"""

import base64
import contextlib
import json
import os
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dtrain.component import suggestion
from dtrain.errors import ClusterError

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where a pod finds the token of its account."""
LOGIN_TIMEOUT_S = 30.0
TOKEN_FILE_AGE_S = 60.0
"""A token in a file is renewed by others: it is read again after this time."""
GET_ONE = (
    "get one from whoever runs the cluster (gcloud container clusters get-credentials, aws eks update-kubeconfig,"
    " az aks get-credentials), or name its path with backend.kubeconfig"
)
LOGINS = {
    "gke-gcloud-auth-plugin": "gcloud auth login",
    "gcloud": "gcloud auth login",
    "aws": "aws sso login (or renew the keys that the aws command uses)",
    "aws-iam-authenticator": "aws sso login (or renew the keys that the aws command uses)",
    "kubelogin": "az login",
}
"""How to log in again, by the command that a kubeconfig asks for credentials."""


@dataclass
class Access:
    """One API server and one identity there."""

    server: str
    source: str
    """In words, for messages: `context gke_h100 of ~/.kube/config`."""
    user: Mapping[str, Any] = field(default_factory=dict)
    folder: Path = Path()
    """Relative paths in `user` and of the authority start here."""
    authority: Mapping[str, Any] = field(default_factory=dict)
    """The kubeconfig's `cluster`."""
    _credentials: dict[str, Any] | None = None
    _until: float = 0.0
    _tls: ssl.SSLContext | None = None

    @property
    def host(self) -> str:
        return urlsplit(self.server).netloc

    @property
    def is_tls(self) -> bool:
        return urlsplit(self.server).scheme == "https"

    @property
    def server_name(self) -> str:
        """The name that the server's certificate must have."""
        return str(self.authority.get("tls-server-name") or urlsplit(self.server).hostname or "")

    @property
    def proxy(self) -> str | None:
        return self.authority.get("proxy-url")

    @property
    def login(self) -> str:
        """The next move of somebody whose credentials are refused."""
        command = Path(str((self.user.get("exec") or {}).get("command", ""))).name
        return LOGINS.get(command) or (f"log in again with {command}" if command else "get a new kubeconfig")

    def headers(self) -> dict[str, str]:
        """What says who we are. As in kubectl, no token goes over a connection that others can read.

        Raises `ClusterError` when credentials cannot be had.
        """
        headers = {}
        if self.is_tls and (token := self._token()):
            headers["Authorization"] = f"Bearer {token}"
        elif self.is_tls and "username" in self.user:
            pair = f"{self.user['username']}:{self.user.get('password', '')}".encode()
            headers["Authorization"] = f"Basic {base64.b64encode(pair).decode()}"
        if "as" in self.user:
            headers["Impersonate-User"] = str(self.user["as"])
        return headers

    def renew(self) -> bool:
        """Forget credentials that were refused; False where the file holds no others."""
        has_others = "exec" in self.user or "tokenFile" in self.user
        self._credentials, self._tls = None, None
        return has_others

    def tls(self) -> ssl.SSLContext:
        """Raises `ClusterError` for certificates that cannot be read."""
        if self._tls is None:
            try:
                self._tls = self._make_tls()
            except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
                raise ClusterError(f"{self.source}: its certificates cannot be read ({error}); {GET_ONE}") from error
        return self._tls

    def _make_tls(self) -> ssl.SSLContext:
        if self.authority.get("insecure-skip-tls-verify"):
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        else:
            authority = self._bytes(self.authority, "certificate-authority")
            # With an authority of its own no other is trusted, nor read: those of the system take 0.1 s.
            context = ssl.create_default_context(cadata=authority.decode() if authority else None)
        # Certificates of many clusters lack what the strict check of newer Pythons asks for.
        context.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)
        issued = self._issued()
        certificate = issued.get("clientCertificateData", "").encode() or self._bytes(self.user, "client-certificate")
        key = issued.get("clientKeyData", "").encode() or self._bytes(self.user, "client-key")
        if certificate and key:
            with tempfile.TemporaryDirectory() as folder:  # it can only be read from a file; mkdtemp's are private
                file = Path(folder) / "client.pem"
                file.write_bytes(certificate + b"\n" + key)
                context.load_cert_chain(file)
        return context

    def _bytes(self, words: Mapping[str, Any], key: str) -> bytes | None:
        """What a kubeconfig gives in itself (`KEY-data`) or in a file (`KEY`)."""
        if data := words.get(f"{key}-data"):
            return base64.b64decode(data, validate=True)
        if path := words.get(key):
            return Path(self.folder / path).expanduser().read_bytes()
        return None

    def _token(self) -> str | None:
        if path := self.user.get("tokenFile"):
            if self._credentials is None or time.monotonic() > self._until:
                try:
                    token = (self.folder / path).expanduser().read_text().strip()
                except OSError as error:
                    raise ClusterError(f"{self.source}: its token cannot be read: {error}; {GET_ONE}") from error
                self._credentials, self._until = {"token": token}, time.monotonic() + TOKEN_FILE_AGE_S
            return str(self._credentials["token"])
        if token := self.user.get("token") or self._issued().get("token"):
            return str(token)
        provider = self.user.get("auth-provider") or {}
        if token := (provider.get("config") or {}).get("id-token"):
            return str(token)
        if provider:
            raise ClusterError(
                f"{self.source}: auth-provider {provider.get('name')!r} is of an old kind that kubectl gave up, too;"
                f" {GET_ONE}"
            )
        return None

    def _issued(self) -> dict[str, Any]:
        """What the exec plugin answers, kept until it runs out."""
        wanted = self.user.get("exec")
        if not wanted:
            return {}
        if self._credentials is None or time.time() > self._until:
            self._credentials = self._ask(wanted)
            self._until = _seconds(self._credentials.get("expirationTimestamp"))
        return self._credentials

    def _ask(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        command, where = str(wanted.get("command")), f"{self.source}: its login command"
        is_terminal = sys.stdin is not None and not sys.stdin.closed and sys.stdin.isatty()
        can_ask = is_terminal and wanted.get("interactiveMode", "IfAvailable") != "Never"
        spec: dict[str, Any] = {"interactive": can_ask}
        if wanted.get("provideClusterInfo"):
            known = ("certificate-authority-data", "tls-server-name", "insecure-skip-tls-verify", "proxy-url")
            spec["cluster"] = {"server": self.server, **{k: v for k, v in self.authority.items() if k in known}}
        told = {"apiVersion": wanted.get("apiVersion"), "kind": "ExecCredential", "spec": spec}
        added = {pair["name"]: str(pair["value"]) for pair in wanted.get("env") or ()}
        words = [str(word) for word in wanted.get("args") or ()]
        try:
            done = subprocess.run(
                [str(self.folder / command) if "/" in command else command, *words],
                env={**os.environ, **added, "KUBERNETES_EXEC_INFO": json.dumps(told)},
                stdin=None if can_ask else subprocess.DEVNULL,
                capture_output=True,
                timeout=LOGIN_TIMEOUT_S,
                check=False,
            )
        except FileNotFoundError:
            hint = " ".join(str(wanted.get("installHint") or f"install {command}").split())
            raise ClusterError(f"{where} {command} is not installed; {hint}") from None
        except subprocess.TimeoutExpired:
            text = f"{where} {command} has not answered within {LOGIN_TIMEOUT_S:g} s; try: {self.login}"
            raise ClusterError(text) from None
        except OSError as error:
            raise ClusterError(f"{where} {command} cannot be run: {error.strerror}; {GET_ONE}") from error
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"]
            text = f"{where} {command} failed with exit code {done.returncode} ({said[-1][:300]}); try: {self.login}"
            raise ClusterError(text)
        try:
            status = json.loads(done.stdout)["status"]
            if not isinstance(status, dict):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise ClusterError(f"{where} {command} printed no credentials; try: {self.login}") from None
        return status


_known: dict[object, Access] = {}


def find(kubeconfig: str | None, context: str | None) -> Access:
    """The server to talk to: of a kubeconfig (the one given, $KUBECONFIG, ~/.kube/config), or of this pod.

    Raises `ClusterError`.
    """
    if kubeconfig:
        files = [Path(kubeconfig).expanduser()]
        if not files[0].is_file():
            raise ClusterError(f"{kubeconfig}: there is no kubeconfig here; {GET_ONE}")
    elif named := os.environ.get("KUBECONFIG"):
        files = [path for word in named.split(os.pathsep) if word and (path := Path(word)).is_file()]
        if not files:
            raise ClusterError(f"$KUBECONFIG names {named}, which is not there; {GET_ONE}")
    else:
        files = [path for path in [Path("~/.kube/config").expanduser()] if path.is_file()]
    if files:
        # Kept for the life of the process, and with it what a login command answers: it may take a second each time.
        key = (tuple((file.resolve(), file.stat().st_mtime_ns) for file in files), context)
        if key not in _known:
            _known[key] = _read(files, context)
        return _known[key]
    if access := _in_cluster():
        return access
    raise ClusterError(f"there is no kubeconfig: neither $KUBECONFIG nor ~/.kube/config; {GET_ONE}")


def _in_cluster() -> Access | None:
    host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT")
    if not (host and port and (ACCOUNT / "token").is_file()):
        return None
    server = f"https://{f'[{host}]' if ':' in host else host}:{port}"
    authority = {"certificate-authority": str(ACCOUNT / "ca.crt")}
    return Access(server, "this pod's service account", {"tokenFile": str(ACCOUNT / "token")}, ACCOUNT, authority)


def _read(files: list[Path], context: str | None) -> Access:
    """Merge kubeconfigs as kubectl does: of two entries with one name the first counts."""
    current, found = "", {kind: dict[str, tuple[dict[str, Any], Path]]() for kind in ("context", "cluster", "user")}
    for file in files:
        config = _parse(file)
        current = current or str(config.get("current-context") or "")
        for kind, entries in found.items():
            for entry in config.get(f"{kind}s") or ():
                entries.setdefault(str(entry.get("name")), (entry.get(kind) or {}, file.resolve().parent))
    where = ", ".join(str(file) for file in files)
    wanted = context or current
    there = sorted(found["context"])
    if not wanted:
        text = f"{where}: no context is chosen; set backend.context to one of {', '.join(there) or 'its contexts'}"
        raise ClusterError(text)
    if wanted not in found["context"]:
        said = "backend.context" if context else "current-context"
        others = f"; there is: {', '.join(there)}" if len(there) < 20 else suggestion(wanted, there)
        raise ClusterError(f"{where}: {said} is {wanted!r}, which it does not have{others or f'; {GET_ONE}'}")
    names = found["context"][wanted][0]
    source = f"context {wanted} of {where}"
    parts: dict[str, tuple[dict[str, Any], Path]] = {}
    for kind in ("cluster", "user"):
        name = str(names.get(kind) or "")
        if name not in found[kind]:
            raise ClusterError(f"{source}: its {kind} {name!r} is missing; {GET_ONE}")
        parts[kind] = found[kind][name]
    cluster, folder = parts["cluster"]
    server = str(cluster.get("server") or "")
    if urlsplit(server).scheme not in ("http", "https") or not urlsplit(server).hostname:
        raise ClusterError(f"{source}: its server {server!r} is no address; {GET_ONE}")
    if path := cluster.get("certificate-authority"):
        cluster = {**cluster, "certificate-authority": str(folder / path)}
    user, folder = parts["user"]
    return Access(server.rstrip("/"), source, user, folder, cluster)


def _parse(file: Path) -> dict[str, Any]:
    import yaml

    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        config = yaml.load(file.read_text(encoding="utf-8"), loader)  # noqa: S506 -- both are safe
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problem = " ".join(str(error).split())
        raise ClusterError(f"{file}: this kubeconfig cannot be read ({problem[:200]}); {GET_ONE}") from error
    if not isinstance(config, dict):
        raise ClusterError(f"{file}: this is no kubeconfig; {GET_ONE}")
    return config


def _seconds(timestamp: str | None) -> float:
    """Seconds since 1970 of a time in RFC 3339, a little before it; never, where there is none."""
    from datetime import datetime

    with contextlib.suppress(ValueError):
        if timestamp:
            return datetime.fromisoformat(timestamp).timestamp() - 10.0
    return float("inf")
