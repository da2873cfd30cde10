"""The loopback API server answers as a real one was recorded to: each recorded request, asked of it."""

import http.client
import json
import ssl
from base64 import b64decode
from pathlib import Path
from typing import Any

import api_schema
import pytest
from api_server import ApiServer
from replay import RECORDINGS

HTTP = RECORDINGS / "http"
NOT_OURS = {
    "400-body-not-json": "the words of Go's own parser",
    "504-list-future-resourceVersion": "its numbers are of that moment",
    "200-watch-old-resourceVersion-ERROR-410-event": "likewise",
    "200-watch-future-resourceVersion": "a stream that says nothing; test_watch.py",
}
"""Recordings that are not compared word by word, and why."""
ASKED = sorted(p.stem for p in HTTP.glob("[2-5]*.json")) if HTTP.is_dir() else ["absent"]


def ask(api: ApiServer, request: dict[str, Any], token: str | None) -> tuple[int, Any, http.client.HTTPMessage]:
    assert api.authority is not None
    context = ssl.create_default_context(cadata=b64decode(api.authority.certificate_base64).decode())
    context.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)
    connection = http.client.HTTPSConnection(api.url.partition("//")[2], context=context, timeout=10)
    try:
        body = request.get("body")
        data = None if body is None else (body if isinstance(body, str) else json.dumps(body)).encode()
        headers = {"Content-Type": request.get("content_type", "application/json")} if data else {}
        headers |= {"Authorization": f"Bearer {token}"} if token else {}
        connection.request(request["method"], request["path"], data, headers)
        answer = connection.getresponse()
        text = answer.read().decode()
        is_json = "json" in answer.headers["Content-Type"] and text
        return answer.status, json.loads(text.splitlines()[0]) if is_json else text, answer.headers
    finally:
        connection.close()


@pytest.mark.parametrize("name", ASKED)
def test_recorded_requests(api: ApiServer, recordings: Path, name: str) -> None:
    if not api_schema.CRDS.is_dir():
        pytest.skip(f"the published CRDs are not here: {api_schema.CRDS}")
    recorded = json.loads((HTTP / f"{name}.json").read_text())
    request = recorded["request"]
    limited = api.user("limited", [("get", "ray.io", "rayjobs")])
    tokens = {"admin": api.token, "user limited": limited, "none": None, "other": "nobody"}
    body = request.get("body")
    is_create = request["method"] == "POST" and isinstance(body, dict)
    existing = json.loads((HTTP / "200-get-allowed-for-limited.json").read_text())["body"]
    if not (is_create and recorded["status"] == 201):
        api.put({**existing, "metadata": {**existing["metadata"], "uid": "ae112c23-f6f4-40aa-98d5-29a8fd6a05c8"}})
    if "managedBy-immutable" in name:
        api.patch("RayJob", "rec1", {"spec": {"managedBy": "ray.io/kuberay-operator"}})
    if recorded["status"] == 410 or "410-event" in name:
        api.compact()
    request["path"] = request["path"].replace("timeoutSeconds=3", "timeoutSeconds=1")
    status, answer, headers = ask(api, request, tokens[request["auth"]])
    assert status == recorded["status"], answer
    if name in NOT_OURS:
        return
    assert headers["Content-Type"] == recorded["headers"]["Content-Type"]
    assert headers.get("Warning") == recorded["headers"].get("Warning")
    expected = recorded["body"]
    if status >= 400:
        assert answer == expected
    elif status == 201 and expected["kind"] == "RayJob":
        assert answer["spec"] == expected["spec"]
        assert answer["metadata"]["generation"] == 1
    elif status == 201:
        assert answer["status"]["allowed"] == expected["status"]["allowed"]


def test_an_update_without_a_change_changes_no_version(api: ApiServer) -> None:
    made = api.put({"kind": "ConfigMap", "metadata": {"name": "x", "namespace": "dtrain"}, "data": {"a": "1"}})
    path = "/api/v1/namespaces/dtrain/configmaps/x"
    request = {"method": "PATCH", "path": path, "content_type": "application/merge-patch+json"}
    _, same, _ = ask(api, {**request, "body": {"data": {"a": "1"}}}, api.token)
    assert same["metadata"]["resourceVersion"] == made["metadata"]["resourceVersion"]
    _, other, _ = ask(api, {**request, "body": {"data": {"a": "2"}}}, api.token)
    assert other["metadata"]["resourceVersion"] != made["metadata"]["resourceVersion"]


def test_what_is_owned_goes_with_its_owner_and_finalizers_hold(api: ApiServer) -> None:
    job = api.put({"kind": "RayJob", "metadata": {"name": "x", "namespace": "dtrain", "finalizers": ["f"]}})
    owner = {"kind": "RayJob", "name": "x", "uid": job["metadata"]["uid"]}
    api.put({"kind": "Pod", "metadata": {"name": "p", "namespace": "dtrain", "ownerReferences": [owner]}})
    path = "/apis/ray.io/v1/namespaces/dtrain/rayjobs/x"
    status, answer, _ = ask(api, {"method": "DELETE", "path": path}, api.token)
    assert (status, "deletionTimestamp" in answer["metadata"]) == (200, True)
    assert api.get("RayJob", "x") is not None
    assert api.get("Pod", "p") is not None
    api.patch("RayJob", "x", {"metadata": {"finalizers": []}})
    assert (api.get("RayJob", "x"), api.get("Pod", "p")) == (None, None)


def test_an_operator_hears_of_everything_once_and_in_order(api: ApiServer) -> None:
    heard = []
    api.put({"kind": "RayJob", "metadata": {"name": "a", "namespace": "dtrain"}})
    with api.listen("RayJob", lambda event, made: heard.append((event, made["metadata"]["name"]))):
        api.put({"kind": "RayJob", "metadata": {"name": "b", "namespace": "dtrain"}})
        api.set_status("RayJob", "b", {"jobDeploymentStatus": "Running"})
        api.remove("RayJob", "b")
    assert heard == [("ADDED", "a"), ("ADDED", "b"), ("MODIFIED", "b"), ("DELETED", "b")]


def test_an_operator_that_fails_is_not_overlooked(api: ApiServer) -> None:
    def fail(event: str, made: dict[str, Any]) -> None:
        raise KeyError(event)

    with pytest.raises(KeyError, match="ADDED"), api.listen("RayJob", fail):
        api.put({"kind": "RayJob", "metadata": {"name": "a", "namespace": "dtrain"}})
