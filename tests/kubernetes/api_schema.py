"""What the API server checks before it takes an object: metadata, and Ray's objects against their published CRDs.

Messages are in the words recorded from a real server. Of CEL rules those are checked that were recorded.
"""

import copy
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import api_refusals as refuse
import yaml
from api_refusals import Refusal
from api_resources import Resource

CRDS = Path(os.environ.get("DTRAIN_CRDS", Path(__file__).parents[3] / "shared" / "kuberay" / "crds"))
"""Published schemas of RayJob and RayCluster; where the folder is absent, nothing of theirs is checked."""
SUBDOMAIN = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"
LABEL = r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?"
NOT_CHECKED = {
    "reason": "FieldValueInvalid",
    "message": "Invalid value: null: some validation rules were not checked because the object was invalid; correct"
    " the existing errors to complete validation",
    "field": "<nil>",
}
TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "boolean": (bool,), "integer": (int,),
    "number": (int, float),
}  # fmt: skip
Cause = dict[str, str]


@dataclass
class Checked:
    """What checking found."""

    object: dict[str, Any]
    """With the defaults of its schema, without fields that it does not know."""
    unknown: list[str] = field(default_factory=list)
    causes: list[Cause] = field(default_factory=list)


def admit(resource: Resource, given: dict[str, Any], validation: str) -> tuple[dict[str, Any], list[str]]:
    """The object as it is kept, and warnings. Raises `Refusal`: 400 for unknown fields under Strict, or 422."""
    name = given.get("metadata", {}).get("name", "")
    if given.get("kind", resource.kind) != resource.kind:
        message = f'Invalid value: "{given["kind"]}": must be {resource.kind}'
        raise refuse.invalid(resource, name, [_cause("kind", message)], kind=given["kind"])
    schema = _schema(resource)
    checked = Checked(copy.deepcopy(given))
    if schema is not None:
        for key, part in schema["properties"].items():
            if key == "spec" and key in checked.object:
                checked.object[key] = _walk(part, checked.object[key], key, checked)
        checked.unknown = [f"{key}" for key in given if key not in schema["properties"]] + checked.unknown
    if checked.unknown and validation == "Strict":
        texts = ", ".join(f'unknown field "{word}"' for word in checked.unknown)
        version = f'{resource.kind} in version "{resource.version}"'
        raise Refusal(400, f"{version} cannot be handled as a {resource.kind}: strict decoding error: {texts}")
    causes = [*_metadata(given.get("metadata", {})), *checked.causes]
    if any(cause["reason"] != "FieldValueInvalid" for cause in checked.causes):
        causes.append(NOT_CHECKED)
    elif schema is not None:
        causes += _rules(checked.object.get("spec") or {})
    if causes:
        raise refuse.invalid(resource, name, causes)
    return checked.object, [f'unknown field "{word}"' for word in checked.unknown if validation != "Ignore"]


def keep_unchanged(resource: Resource, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Raises `Refusal` 422 when a field was changed that cannot be."""
    was, is_ = (made.get("spec", {}).get("managedBy") for made in (before, after))
    if resource.group == "ray.io" and was and was != is_:
        message = f'Invalid value: "{is_}": the managedBy field is immutable'
        raise refuse.invalid(resource, after["metadata"]["name"], [_cause("spec.managedBy", message)])


@cache
def _schema(resource: Resource) -> dict[str, Any] | None:
    file = CRDS / f"{resource.group}_{resource.plural}.yaml"
    if resource.group != "ray.io" or not file.is_file():
        return None
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    versions = yaml.load(file.read_text(encoding="utf-8"), loader)["spec"]["versions"]
    found = next(version for version in versions if version["name"] == resource.version)
    return dict(found["schema"]["openAPIV3Schema"])


def _walk(schema: dict[str, Any], value: Any, at: str, checked: Checked) -> Any:
    """`value` with defaults and without unknown fields; mistakes go to `checked`."""
    kind = schema.get("type")
    if schema.get("x-kubernetes-int-or-string"):
        kind = None
        if not isinstance(value, int | str) or isinstance(value, bool):
            checked.causes.append(_wrong_type(at, "integer,string", value))
            return value
    if value is None and schema.get("nullable"):
        return value
    if kind and (not isinstance(value, TYPES[kind]) or (isinstance(value, bool) and kind in ("integer", "number"))):
        checked.causes.append(_wrong_type(at, kind, value))
        return value
    checked.causes += _limits(schema, value, at)
    if kind == "array":
        return [_walk(schema["items"], item, f"{at}[{number}]", checked) for number, item in enumerate(value)]
    if kind != "object":
        return value
    properties, extra = schema.get("properties", {}), schema.get("additionalProperties")
    made = {}
    for key, item in value.items():
        if key in properties:
            made[key] = _walk(properties[key], item, f"{at}.{key}", checked)
        elif isinstance(extra, dict):
            made[key] = _walk(extra, item, f"{at}.{key}", checked)
        elif schema.get("x-kubernetes-preserve-unknown-fields") or not properties:
            made[key] = item
        else:
            checked.unknown.append(f"{at}.{key}")
    made |= {key: part["default"] for key, part in properties.items() if key not in made and "default" in part}
    for key in schema.get("required", ()):
        if key not in made:
            message = "Required value"
            checked.causes.append({"reason": "FieldValueRequired", "message": message, "field": f"{at}.{key}"})
    return made


def _limits(schema: dict[str, Any], value: Any, at: str) -> Iterator[Cause]:
    if "enum" in schema and value not in schema["enum"]:
        supported = ", ".join(f'"{word}"' for word in schema["enum"])
        message = f'Unsupported value: "{value}": supported values: {supported}'
        yield {"reason": "FieldValueNotSupported", "message": message, "field": at}
    if "minimum" in schema and value < schema["minimum"]:
        text = f"should be greater than or equal to {schema['minimum']}"
        yield _cause(at, f"Invalid value: {value}: {at} in body {text}")
    if "maximum" in schema and value > schema["maximum"]:
        yield _cause(at, f"Invalid value: {value}: {at} in body should be less than or equal to {schema['maximum']}")
    if "pattern" in schema and isinstance(value, str) and not re.search(schema["pattern"], value):
        yield _cause(at, f"Invalid value: \"{value}\": {at} in body should match '{schema['pattern']}'")
    if "maxLength" in schema and isinstance(value, str) and len(value) > schema["maxLength"]:
        yield {"reason": "FieldValueTooLong", "message": f"Too long: may not be more than {schema['maxLength']} bytes",
               "field": at}  # fmt: skip


def _rules(spec: dict[str, Any]) -> Iterator[Cause]:
    manager = spec.get("managedBy")
    if manager not in (None, "ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"):
        text = "the managedBy field value must be either 'ray.io/kuberay-operator' or 'kueue.x-k8s.io/multikueue'"
        yield _cause("spec.managedBy", f'Invalid value: "{manager}": {text}')
    strategy = spec.get("deletionStrategy")
    if strategy is None:
        return
    if not (("onSuccess" in strategy and "onFailure" in strategy) or strategy.get("deletionRules")):
        text = "deletionStrategy requires either BOTH onSuccess and onFailure, OR the deletionRules field"
        yield _cause("spec.deletionStrategy", f"Invalid value: {text} (cannot be empty)")
    for number, rule in enumerate(strategy.get("deletionRules", ())):
        if not {"jobStatus", "jobDeploymentStatus"} & set(rule.get("condition", {})):
            text = "the deletion condition requires either the JobStatus or the JobDeploymentStatus field."
            yield _cause(f"spec.deletionStrategy.deletionRules[{number}].condition", f"Invalid value: {text}")


def _metadata(metadata: dict[str, Any]) -> Iterator[Cause]:
    name = metadata.get("name")
    if name is not None and not (re.fullmatch(SUBDOMAIN, name) and len(name) <= 253):
        text = (
            "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must"
            " start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is"
            f" '{SUBDOMAIN}')"
        )
        yield _cause("metadata.name", f'Invalid value: "{name}": {text}')
    for value in (metadata.get("labels") or {}).values():
        if not (re.fullmatch(LABEL, value) and len(value) <= 63):
            text = (
                "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must"
                " start and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used"
                f" for validation is '{LABEL}')"
            )
            yield _cause("metadata.labels", f'Invalid value: "{value}": {text}')


def _cause(at: str, message: str) -> Cause:
    return {"reason": "FieldValueInvalid", "message": message, "field": at}


def _wrong_type(at: str, kind: str, value: Any) -> Cause:
    found = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    word = found.get(type(value), "null")
    message = f'Invalid value: "{word}": {at} in body must be of type {kind}: "{word}"'
    return {"reason": "FieldValueTypeInvalid", "message": message, "field": at}
