"""How a Kubernetes API server says no: the `Status` bodies, in the words that were recorded from a real one."""

from collections.abc import Iterable, Mapping
from typing import Any

from api_resources import Resource

REASONS = {
    400: "BadRequest", 401: "Unauthorized", 403: "Forbidden", 404: "NotFound", 405: "MethodNotAllowed",
    409: "Conflict", 410: "Expired", 415: "UnsupportedMediaType", 422: "Invalid", 429: "TooManyRequests",
    500: "InternalError", 502: "InternalError", 503: "ServiceUnavailable", 504: "Timeout",
}  # fmt: skip


class Refusal(Exception):
    """An answer other than 2xx."""

    def __init__(self, code: int, message: str, reason: str | None = None, **details: Any) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.reason = reason or REASONS[code]
        self.details = details
        self.headers: dict[str, str] = {}
        self.metadata: dict[str, str] = {}
        if seconds := details.get("retryAfterSeconds"):
            self.headers["Retry-After"] = str(seconds)

    @property
    def body(self) -> dict[str, Any]:
        body = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": self.metadata,
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "code": self.code,
        }
        if self.details:
            body["details"] = self.details
        return body


def _named(resource: Resource, name: str | None, kind: str) -> dict[str, Any]:
    words = {"name": name, "group": resource.group, "kind": kind}
    return {key: word for key, word in words.items() if word}


def not_found(resource: Resource, name: str) -> Refusal:
    message = f'{resource.qualified} "{name}" not found'
    return Refusal(404, message, **_named(resource, name, resource.plural))


def no_namespace(namespace: str) -> Refusal:
    return Refusal(404, f'namespaces "{namespace}" not found', name=namespace, kind="namespaces")


def exists(resource: Resource, name: str) -> Refusal:
    message = f'{resource.qualified} "{name}" already exists'
    return Refusal(409, message, "AlreadyExists", **_named(resource, name, resource.plural))


def modified(resource: Resource, name: str) -> Refusal:
    message = (
        f'Operation cannot be fulfilled on {resource.qualified} "{name}": the object has been modified; please apply'
        " your changes to the latest version and try again"
    )
    return Refusal(409, message, **_named(resource, name, resource.plural))


def other_uid(resource: Resource, name: str, wanted: str, found: str) -> Refusal:
    message = (
        f'Operation cannot be fulfilled on {_kind(resource)} "{name}": the UID in the precondition ({wanted}) does not'
        f" match the UID in record ({found}). The object might have been deleted and then recreated"
    )
    return Refusal(409, message, **_named(resource, name, resource.kind))


def forbidden(
    user: str, verb: str, resource: Resource, subresource: str, namespace: str | None, name: str | None
) -> Refusal:
    what = f"{resource.plural}/{subresource}" if subresource else resource.plural
    where = f'in the namespace "{namespace}"' if namespace else "at the cluster scope"
    subject = f'{resource.qualified} "{name}"' if name else resource.qualified
    message = (
        f'{subject} is forbidden: User "{user}" cannot {verb} resource "{what}" in API group "{resource.group}" {where}'
    )
    return Refusal(403, message, **_named(resource, name, resource.plural))


def over_quota(resource: Resource, name: str, quota: str, key: str, used: str, limited: str) -> Refusal:
    message = (
        f'{resource.qualified} "{name}" is forbidden: exceeded quota: {quota}, requested: {key}=1, used: {key}={used},'
        f" limited: {key}={limited}"
    )
    return Refusal(403, message, **_named(resource, name, resource.plural))


def invalid(resource: Resource, name: str, causes: Iterable[Mapping[str, str]], kind: str | None = None) -> Refusal:
    """422 with the fields that are wrong."""
    found = [dict(cause) for cause in causes]
    texts = [f"{cause['field']}: {cause['message']}" for cause in found]
    text = texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"
    named = _kind(resource) if kind is None else f"{kind}.{resource.group}" if resource.group else kind
    message = f'{named} "{name}" is invalid: {text}'
    return Refusal(422, message, **_named(resource, name, kind or resource.kind), causes=found)


def expired_continue(token: str) -> Refusal:
    """With a token that goes on regardless of what has changed."""
    refusal = Refusal(
        410,
        "The provided continue parameter is too old to display a consistent list result. You can start a new list"
        " without the continue parameter, or use the continue token in this response to retrieve the remainder of the"
        " results. Continuing with the provided token results in an inconsistent list - objects that were created,"
        " modified, or deleted between the time the first chunk was returned and now may show up in the list.",
    )
    refusal.metadata["continue"] = token
    return refusal


def expired_list() -> Refusal:
    return Refusal(410, "The resourceVersion for the provided list is too old.")


def expired_watch(version: int, oldest: int) -> Refusal:
    return Refusal(410, f"too old resource version: {version} ({oldest})")


def future_list(version: int, current: int) -> Refusal:
    causes = [{"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}]
    message = f"Timeout: Too large resource version: {version}, current: {current}"
    return Refusal(504, message, causes=causes, retryAfterSeconds=1)


def _kind(resource: Resource) -> str:
    return f"{resource.kind}.{resource.group}" if resource.group else resource.kind
