"""What may stand in a file, for editors (JSON Schema) and for readers (the reference in Markdown)."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import CoreSchema

from dtrain.component import Options
from dtrain.spec import words
from dtrain.spec.cluster import ClusterSpec
from dtrain.spec.job import SHORT_FORMS, JobSpec, ScriptSpec

SPECS: dict[str, type[Options]] = {"job": JobSpec, "cluster": ClusterSpec}


def json_schema(kind: str) -> dict[str, Any]:
    """JSON Schema of a `job` or a `cluster` file; editors complete and check files by it."""
    schema = _of(SPECS[kind])
    if SPECS[kind] is JobSpec:
        schema = _with_scripts(schema, _of(ScriptSpec))
    title = f"dtrain {kind} file"
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title, **schema}


def _of(spec: type[Options]) -> dict[str, Any]:
    return spec.model_json_schema(by_alias=True, schema_generator=_Generator)


def _with_scripts(job: dict[str, Any], script: dict[str, Any]) -> dict[str, Any]:
    """One schema for both kinds of job: what may stand in a file depends on whether it has an `entrypoint`."""
    properties = {**job["properties"], **{k: v for k, v in script["properties"].items() if k not in job["properties"]}}
    for key in SHORT_FORMS:
        long = dict(properties[key])
        said = {"description": long.pop("description")} if "description" in long else {}
        properties[key] = {**said, "anyOf": [long, {"type": "string", "pattern": "^[^:]+:[A-Za-z_]\\w*$"}]}
    only_job = {key: False for key in job["properties"] if key not in script["properties"]}
    both = [key for key in job["required"] if key in script["required"]]
    return {
        **job,
        "$defs": {**job["$defs"], **script["$defs"]},
        "properties": properties,
        "required": both,
        "if": {"required": [key for key in script["required"] if key not in both]},
        "then": {"properties": only_job},
        "else": {"required": job["required"]},
    }


def schema_text(kind: str) -> str:
    """The same as the text of a `.schema.json` file."""
    return json.dumps(json_schema(kind), indent=2, ensure_ascii=False) + "\n"


def reference(kind: str) -> str:
    """Every key of a `job` or a `cluster` file as Markdown tables: one for the file, one for each component.

    `script` is for a job file that has an `entrypoint`.
    """
    return "\n\n".join(_sections(ScriptSpec if kind == "script" else SPECS[kind], "")) + "\n"


def generated() -> dict[str, str]:
    """What the repository keeps of this, by path: `make generate` writes it, a test compares it."""
    options = [
        "# Every key of a job and of a cluster file\n",
        "Written by `make generate` from the sentences beside the options in the code.\n",
        f"## Job file\n\n{reference('job')}",
        f"## Job file that runs a script of your own\n\n{reference('script')}",
        f"## Cluster file\n\n{reference('cluster')}",
    ]
    schemas = {f"{kind}s/{kind}.schema.json": schema_text(kind) for kind in SPECS}
    return {**schemas, "docs/options.md": "\n".join(options)}


class _Generator(GenerateJsonSchema):
    """Without titles that only repeat the key."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def model_schema(self, schema: Any) -> dict[str, Any]:
        made = super().model_schema(schema)
        made.pop("title", None)
        names = words.fields(schema["cls"]) if issubclass(schema["cls"], Options) else {}
        for key, field in names.items():
            if field.description:
                made["properties"][key].setdefault("description", field.description)
        only = made.get("properties", {}).get("name", {})
        if "const" in only and "name" in names:
            # The code may leave the name of a component out, a file may not.
            only.pop("default", None)
            made["required"] = ["name", *(key for key in made.get("required", []) if key != "name")]
        return made

    def generate(self, schema: CoreSchema, mode: Any = "validation") -> dict[str, Any]:
        return dict(super().generate(schema, mode))


def _sections(model: type[Options], prefix: str, *, listed: bool = False) -> Iterator[str]:
    """A table of one settings class, unless it is `listed` already, then those of the components it chooses from."""
    rows = list(_rows(model, prefix))
    if rows and not listed:
        yield _table(rows)
    for key, field in words.fields(model).items():
        annotation = words.annotation_of(field)
        choices = words.components(annotation)
        for name, component in choices.items():
            yield f"### `{prefix}{key}: {{name: {name}}}`"
            yield (component.__doc__ or "").strip()
            yield from _sections(component, f"{prefix}{key}.")
        inner = words.model_of(annotation)
        if inner is not None and not choices:
            yield from _sections(inner, f"{prefix}{key}.", listed=True)


def _table(rows: list[tuple[str, str, str, str]]) -> str:
    header = ["| key | what may stand there | default | meaning |", "|---|---|---|---|"]
    return "\n".join(header + [f"| {' | '.join(_escape(cell) for cell in row)} |" for row in rows])


def _rows(model: type[Options], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    for key, field in words.fields(model).items():
        annotation = words.annotation_of(field)
        if len(words.choices(annotation)) == 1 and key == "name" and prefix:
            continue
        inner = words.model_of(annotation)
        if inner is not None and not words.components(annotation):
            yield from _rows(inner, f"{prefix}{key}.")
        else:
            yield f"`{prefix}{key}`", words.expected(annotation), _default(field), field.description or ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, Options):
        value = {"name": value.name} if hasattr(value, "name") else {}
    return f"`{json.dumps(value, default=str)}`"


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    for path, text in generated().items():
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_text(text, encoding="utf-8")
