"""From what an API server refuses to one message that says where, what, and the next move. Pure."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dtrain.errors import ClusterError

INSTALL = {
    "ray.io": "install the KubeRay operator: helm install kuberay-operator kuberay/kuberay-operator"
    " (helm/dtrain brings it along with kuberay-operator.enabled=true)",
    "kueue.x-k8s.io": "install Kueue, or remove backend.queue from the cluster file",
}
"""By API group, how what serves it is installed."""
NAMES = {"ray.io": "KubeRay", "kueue.x-k8s.io": "Kueue"}
CANNOT = re.compile(
    r'User "(?P<user>[^"]*)" cannot (?P<verb>\S+) resource "(?P<resource>[^"]*)" in API group "(?P<group>[^"]*)"'
    r'(?: in the namespace "(?P<namespace>[^"]*)")?'
)
QUOTA = re.compile(
    r"exceeded quota: (?P<quota>[^,]+), requested: (?P<asked>.+), used: (?P<used>.+), limited: (?P<hard>.+)"
)
UNKNOWN_FIELD = re.compile(r'unknown field "([^"]+)"')
NAMESPACE_GONE = re.compile(r'namespaces "([^"]+)" not found')


class Refused(ClusterError):
    """The API server said no; `code` and `reason` are its own."""

    code: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Asked:
    """What was asked for, as messages name it."""

    source: str
    """Whom: `context kind of ~/.kube/config`."""
    login: str
    """How to log in there again."""
    method: str
    path: str
    kind: str = ""
    """Kind of the object that was sent."""

    @property
    def group(self) -> str:
        words = self.path.split("/")
        return words[2] if words[1] == "apis" and len(words) > 2 else ""


def refused(asked: Asked, code: int, body: bytes, content_type: str) -> Refused:
    """The error for an answer that is not 2xx."""
    status = _status(body, content_type)
    message = str(status.get("message") or body[:300].decode(errors="replace").strip() or f"HTTP {code}")
    error = Refused(_explain(asked, code, message, status, is_status=bool(status)))
    error.code, error.reason = code, str(status.get("reason") or "")
    return error


def _explain(asked: Asked, code: int, message: str, status: Mapping[str, Any], *, is_status: bool) -> str:
    if code == 401:
        return f"{asked.source}: the cluster does not accept these credentials, they may have run out; {asked.login}"
    if code == 403:
        return _forbidden(asked, message)
    if code == 404 and not is_status:
        name = NAMES.get(asked.group, asked.group or asked.path)
        remedy = INSTALL.get(asked.group, "check that backend.context is the right cluster")
        return f"{asked.source}: {name} is not installed in this cluster, or in another version; {remedy}"
    if code == 404 and (gone := NAMESPACE_GONE.search(message)):
        return (
            f"{asked.source}: there is no namespace {gone[1]}; create it (kubectl create namespace {gone[1]}),"
            " or set backend.namespace to yours"
        )
    if code == 400 and (fields := UNKNOWN_FIELD.findall(message)):
        return (
            f"{asked.source}: the cluster does not know {', '.join(fields)} of {asked.kind}, so what is installed there"
            f" is older than what dtrain writes for; upgrade {NAMES.get(asked.group, 'the cluster')},"
            " or leave out the option that asks for it"
        )
    if code == 422:
        return _invalid(asked, message, status)
    if code == 409:
        return f"{asked.source}: {message}; choose another name, or delete what has it"
    if code in (429, 500, 502, 503, 504):
        return f"{asked.source}: the cluster cannot answer at the moment ({code}: {message}); try again in a minute"
    told = f"the cluster refused {asked.method} {asked.path} ({code}: {message})"
    return f"{asked.source}: {told}; see `dtrain cluster doctor`"


def _forbidden(asked: Asked, message: str) -> str:
    if over := QUOTA.search(message):
        return (
            f"{asked.source}: quota {over['quota']} of the namespace is used up: asked for {over['asked']}, in use"
            f" {over['used']}, allowed {over['hard']}; end a run (`dtrain ps`, `dtrain stop RUN`), or ask for more"
        )
    found = CANNOT.search(message)
    if found is None:
        return f"{asked.source}: the cluster forbids it: {message}; ask whoever runs the cluster"
    resource, group = found["resource"], found["group"]
    where = f"in namespace {found['namespace']}" if found["namespace"] else "in the whole cluster"
    if found["user"] == "system:anonymous":
        text = f"the cluster was told of no credentials, and nobody may {found['verb']} {resource} {where}"
        return f"{asked.source}: {text}; {asked.login}"
    return f"{asked.source}: {may_not(found['user'], found['verb'], group, resource, where)}"


def may_not(user: str, verb: str, group: str, resource: str, where: str) -> str:
    """That somebody lacks a right, and the rule to ask for."""
    named = f"{resource} ({group})" if group else resource
    rule = f"{{apiGroups: [{group or repr('')}], resources: [{resource}], verbs: [{verb}]}}"
    return f"{user} may not {verb} {named} {where}; ask for a role with the rule {rule} (helm/dtrain has one)"


def _invalid(asked: Asked, message: str, status: Mapping[str, Any]) -> str:
    causes = (status.get("details") or {}).get("causes") or ()
    fields = [f"{c.get('field')}: {c.get('message')}" for c in causes if c.get("field") not in (None, "<nil>")]
    text = "; ".join(fields) or message
    return (
        f"{asked.source}: the cluster finds this {asked.kind or 'object'} invalid: {text};"
        " change the option of the cluster file that sets it"
    )


def _status(body: bytes, content_type: str) -> dict[str, Any]:
    import json

    if "json" not in content_type:
        return {}
    try:
        status = json.loads(body)
    except ValueError:
        return {}
    return status if isinstance(status, dict) and status.get("kind") == "Status" else {}
