"""The objects of the loopback API server: versions, conflicts, selectors, pages, deletion, and who watches them."""

import base64
import copy
import json
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import api_refusals as refuse
from api_refusals import Refusal
from api_resources import Catalogue, Resource

Object = dict[str, Any]
Match = Callable[[Object], bool]


@dataclass(frozen=True)
class Change:
    """One entry of the history that watches read."""

    version: int
    resource: Resource
    type: str
    object: Object
    before: Object | None
    """What it was, so that a watch with a selector sees it leave."""


class Store:
    """Every method is whole: what it did is seen by all others, or nothing of it."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        self.changed = threading.Condition(threading.RLock())
        self.version = 100
        self.oldest = 0
        self.history: list[Change] = []
        self._objects: dict[Resource, dict[tuple[str, str], Object]] = {}

    # -- reading ---------------------------------------------------------------------------------------------

    def read(self, resource: Resource, namespace: str | None, name: str) -> Object:
        """A copy. Raises `Refusal`."""
        with self.changed:
            return copy.deepcopy(self._live(resource, namespace, name))

    def all(self, resource: Resource, namespace: str | None, matches: Match = lambda _: True) -> list[Object]:
        with self.changed:
            kept = self._objects.get(resource, {})
            return [kept[k] for k in sorted(kept) if (not namespace or k[0] == namespace) and matches(kept[k])]

    def page(
        self, resource: Resource, namespace: str | None, matches: Match, limit: int, token: str, version: int | None
    ) -> Object:
        """A list, or one page of it. Raises `Refusal` (410) when the token or the version is too old."""
        with self.changed:
            after = ("", "")
            if version is not None and version > self.version:
                raise refuse.future_list(version, self.version)
            if token:
                mark = json.loads(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))
                if 0 <= mark["rv"] < self.oldest:
                    raise refuse.expired_continue(_token({**mark, "rv": -1}))
                after = tuple(mark["start"].split("/", 1))
            items = [o for o in self.all(resource, namespace, matches) if _key(o) > after]
            metadata: Object = {"resourceVersion": str(self.version)}
            if limit and len(items) > limit:
                start = "/".join(_key(items[limit - 1]))
                metadata["continue"] = _token({"v": "meta.k8s.io/v1", "rv": self.version, "start": start})
                metadata["remainingItemCount"] = len(items) - limit
                items = items[:limit]
            head = {"kind": f"{resource.kind}List", "apiVersion": resource.api_version, "metadata": metadata}
            return {**head, "items": items}  # objects are replaced, never changed in place

    def changes(self, resource: Resource, namespace: str | None, matches: Match, since: int) -> Iterator[Object]:
        """Watch events after a version, those there are. Raises `Refusal` (410) when they are forgotten."""
        with self.changed:
            if since < self.oldest:
                raise refuse.expired_watch(since, self.oldest)
            found = [c for c in self.history if c.version > since and c.resource == resource]
        for change in found:
            if namespace and change.object["metadata"].get("namespace") != namespace:
                continue
            is_in, was_in = matches(change.object), change.before is not None and matches(change.before)
            if change.type == "DELETED":
                kind = "DELETED" if is_in or was_in else None
            else:
                kind = ("MODIFIED" if was_in else "ADDED") if is_in else ("DELETED" if was_in else None)
            if kind:
                yield {"type": kind, "object": change.object}

    # -- writing ---------------------------------------------------------------------------------------------

    def create(self, resource: Resource, namespace: str | None, given: Object, *, is_trial: bool = False) -> Object:
        """Raises `Refusal` when the name is taken, or the namespace is not there."""
        made = copy.deepcopy(given)
        metadata = made.setdefault("metadata", {})
        with self.changed:
            if resource.namespaced:
                metadata["namespace"] = namespace
                if (("", str(namespace))) not in self._objects.get(self.catalogue.of_kind("Namespace"), {}):
                    raise refuse.no_namespace(str(namespace))
            if "name" not in metadata and "generateName" in metadata:
                metadata["name"] = metadata["generateName"] + uuid.uuid4().hex[:5]
            if _key(made) in self._objects.get(resource, {}):
                raise refuse.exists(resource, metadata["name"])
            metadata.update(uid=str(uuid.uuid4()), creationTimestamp=now(), generation=1)
            if is_trial:
                return made
            return self._put(resource, made, "ADDED")

    def replace(
        self, resource: Resource, namespace: str | None, name: str, given: Object, part: str = "", *, is_trial: bool
    ) -> Object:
        """PUT: the whole object, or its status. Raises `Refusal` when it has been modified meanwhile."""
        with self.changed:
            found = self._live(resource, namespace, name)
            version = given.get("metadata", {}).get("resourceVersion")
            if version and version != found["metadata"]["resourceVersion"]:
                raise refuse.modified(resource, name)
            made = copy.deepcopy(found)
            if part == "status":
                made["status"] = copy.deepcopy(given.get("status", {}))
            else:
                kept = {key: found["metadata"][key] for key in ("uid", "creationTimestamp", "generation")}
                kept |= {k: found["metadata"][k] for k in ("deletionTimestamp", "namespace") if k in found["metadata"]}
                made = {**copy.deepcopy(given), "metadata": {**copy.deepcopy(given.get("metadata", {})), **kept}}
                if "status" in found and "status" in resource.subresources:
                    made["status"] = found["status"]
                if made.get("spec") != found.get("spec"):
                    made["metadata"]["generation"] += 1
            return made if is_trial else self._settle(resource, made)

    def put(self, resource: Resource, given: Object) -> Object:
        """As an operator or a kubelet would: whatever is given, status included, is what there is."""
        with self.changed:
            made = copy.deepcopy(given)
            if resource.namespaced:
                made["metadata"].setdefault("namespace", "default")
            found = self._objects.get(resource, {}).get(_key(made))
            fresh = {"uid": str(uuid.uuid4()), "creationTimestamp": now(), "generation": 1}
            old = {k: found["metadata"][k] for k in fresh} if found else fresh
            made["metadata"] = {**old, **made["metadata"]}
            return self._settle(resource, made) if found else self._put(resource, made, "ADDED")

    def delete(
        self, resource: Resource, namespace: str | None, name: str, preconditions: Mapping[str, str] | None = None,
        *, is_trial: bool = False,
    ) -> Object:  # fmt: skip
        """Take away, or mark as deleted while finalizers hold it. Raises `Refusal`."""
        with self.changed:
            found = self._live(resource, namespace, name)
            wanted = (preconditions or {}).get("uid")
            if wanted and wanted != found["metadata"]["uid"]:
                raise refuse.other_uid(resource, name, wanted, found["metadata"]["uid"])
            if is_trial:
                return copy.deepcopy(found)
            made = copy.deepcopy(found)
            made["metadata"].setdefault("deletionTimestamp", now())
            made["metadata"].setdefault("deletionGracePeriodSeconds", 0)
            return self._settle(resource, made)

    def _settle(self, resource: Resource, made: Object) -> Object:
        """Keep an object, or drop it when it is deleted and nothing holds it any more."""
        metadata = made["metadata"]
        if metadata.get("deletionTimestamp") and not metadata.get("finalizers"):
            return self._drop(resource, made)
        before = self._objects[resource][_key(made)]
        metadata["resourceVersion"] = before["metadata"]["resourceVersion"]
        if made == before:
            return copy.deepcopy(before)  # nothing changed, so nobody is told
        return self._put(resource, made, "MODIFIED")

    def _put(self, resource: Resource, made: Object, kind: str) -> Object:
        made.setdefault("kind", resource.kind)
        made.setdefault("apiVersion", resource.api_version)
        before = self._objects.get(resource, {}).get(_key(made))
        self.version += 1
        made["metadata"]["resourceVersion"] = str(self.version)
        self._objects.setdefault(resource, {})[_key(made)] = made
        self._tell(Change(self.version, resource, kind, made, before))
        return copy.deepcopy(made)

    def _drop(self, resource: Resource, made: Object) -> Object:
        before = self._objects[resource].pop(_key(made))
        self.version += 1
        made["metadata"]["resourceVersion"] = str(self.version)
        self._tell(Change(self.version, resource, "DELETED", made, before))
        uid = made["metadata"]["uid"]
        for other in self.catalogue.resources:
            for held in self.all(other, None, lambda o: _is_owned_by(o, uid)):
                self.delete(other, held["metadata"].get("namespace"), held["metadata"]["name"])
        return copy.deepcopy(made)

    def _tell(self, change: Change) -> None:
        self.history.append(change)
        self.changed.notify_all()

    def _live(self, resource: Resource, namespace: str | None, name: str) -> Object:
        key = (namespace or "" if resource.namespaced else "", name)
        try:
            return self._objects[resource][key]
        except KeyError:
            raise refuse.not_found(resource, name) from None

    def compact(self) -> None:
        """Forget all changes so far: versions from before are too old now."""
        with self.changed:
            self.version += 1
            self.oldest = self.version
            self.history.clear()
            self.changed.notify_all()


def merge(target: Any, patch: Any) -> Any:
    """A JSON merge patch (RFC 7386)."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    made = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            made.pop(key, None)
        else:
            made[key] = merge(made.get(key), value)
    return made


def operated(target: Object, operations: list[Object]) -> Object:
    """A JSON patch (RFC 6902), as far as members of objects are added, replaced or removed."""
    made = copy.deepcopy(target)
    for operation in operations:
        *way, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
        place: Any = made
        for part in way:
            place = place[int(part) if isinstance(place, list) else part]
        if operation["op"] == "remove":
            del place[last]
        elif operation["op"] == "add" or (operation["op"] == "replace" and last in place):
            place[last] = operation["value"]
        else:
            raise Refusal(422, f"the server rejected our request due to an error in our request: {operation}")
    return made


def selector(labels: str, fields: str) -> Match:
    """What a labelSelector and a fieldSelector let pass. Raises `Refusal` for one that cannot be read."""
    wanted = [_label(word.strip()) for word in re.findall(r"[^,(]+(?:\([^)]*\))?", labels)]
    for word in filter(None, fields.split(",")):
        key, _, value = word.partition("=")
        is_not = key.endswith("!")
        wanted.append(_field(key.rstrip("!"), value.lstrip("="), is_not=is_not))
    return lambda made: all(match(made) for match in wanted)


def _label(word: str) -> Match:
    def value(made: Object, key: str) -> str | None:
        return dict(made["metadata"].get("labels") or {}).get(key)

    if found := re.fullmatch(r"(\S+) (in|notin) \(([^)]*)\)", word):
        key, how, options = found[1], found[2], {option.strip() for option in found[3].split(",")}
        return lambda made: (value(made, key) in options) is (how == "in")
    if found := re.fullmatch(r"([^=!\s]+)\s*(==|=|!=)\s*(\S*)", word):
        key, how, option = found[1], found[2], found[3]
        return lambda made: (value(made, key) == option) is (how != "!=")
    if found := re.fullmatch(r"(!?)([^=!\s]+)", word):
        key, how = found[2], found[1]
        return lambda made: (value(made, key) is None) is (how == "!")
    raise Refusal(400, f'unable to parse requirement: found "{word}"')


def _field(key: str, wanted: str, *, is_not: bool) -> Match:
    def match(made: Object) -> bool:
        value: Any = made
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return (str(value or "") == wanted) is not is_not

    return match


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def deadline(timeout_s: float) -> Callable[[], float]:
    """Seconds left."""
    until = time.monotonic() + timeout_s
    return lambda: until - time.monotonic()


def _token(mark: Object) -> str:
    text = json.dumps(mark, separators=(",", ":"))
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def _key(made: Object) -> tuple[str, str]:
    return made["metadata"].get("namespace", ""), made["metadata"]["name"]


def _is_owned_by(made: Object, uid: str) -> bool:
    return any(owner["uid"] == uid for owner in made["metadata"].get("ownerReferences") or ())
