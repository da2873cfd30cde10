"""What may stand in a file, for editors (JSON Schema) and for readers (the reference in Markdown)."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from dtrain.settings import Choice, Settings
from dtrain.spec import words
from dtrain.spec.cluster import ClusterSpec
from dtrain.spec.job import SHORT_FORMS, JobSpec, ScriptSpec

REF = "#/$defs/{name}"
NO_BOUNDS = (-sys.float_info.max, sys.float_info.max)
BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
SPECS: dict[str, type[Settings]] = {"job": JobSpec, "cluster": ClusterSpec}


def json_schema(kind: str) -> dict[str, Any]:
    """JSON Schema of a `job` or a `cluster` file; editors complete and check files by it."""
    schema = _of(SPECS[kind])
    if SPECS[kind] is JobSpec:
        schema = _with_scripts(schema, _of(ScriptSpec))
    title = f"dtrain {kind} file"
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title, **schema}


def _of(spec: type[Settings]) -> dict[str, Any]:
    """msgspec's schema of the types; what depends on a choice of components, and the help, is added to it."""
    models = list(dict.fromkeys(_models(spec)))
    refs, _ = msgspec.json.schema_components(models, schema_hook=lambda _: {"not": {}}, ref_template=REF)
    ref = dict(zip(models, refs, strict=True))

    def any_of(choice: type) -> dict[str, Any]:
        assert isinstance(choice, Choice)
        by_name = {name: ref[component] for name, component in choice.options.items()}
        mapping = {name: one["$ref"] for name, one in by_name.items()}
        return {"discriminator": {"propertyName": "name", "mapping": mapping}, "oneOf": list(by_name.values())}

    _, made = msgspec.json.schema_components(models, schema_hook=any_of, ref_template=REF)
    key = {model: one["$ref"].rpartition("/")[2] for model, one in ref.items()}
    definitions = {key[model]: _explained(made[key[model]], model) for model in models}
    return {**definitions.pop(key[spec]), "$defs": definitions}


def _models(model: type[Settings]) -> Iterator[type[Settings]]:
    """A settings class and all that it is made of."""
    yield model
    for field in words.fields(model).values():
        inside = words.models(field.annotation)
        for each in inside:
            yield from _models(each)


def _explained(schema: dict[str, Any], model: type[Settings]) -> dict[str, Any]:
    properties = {}
    for key, field in words.fields(model).items():
        properties[key] = {**_for_editors(schema["properties"][key]), "description": field.help}
        if field.is_required:
            properties[key].pop("default", None)
    required = [key for key, field in words.fields(model).items() if field.is_required]
    kept = {word: value for word, value in schema.items() if word not in ("title", "properties", "required")}
    return {**kept, "properties": properties, **({"required": required} if required else {})}


def _for_editors(schema: Any) -> Any:
    """Patterns as editors read them, and no bounds that every number keeps."""
    if isinstance(schema, list):
        return [_for_editors(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {word: _for_editors(value) for word, value in schema.items() if value not in NO_BOUNDS}
    for bound in BOUNDS & made.keys():  # equal types are one to Python, so 1 and 1.0 would depend on which came first
        made[bound] = int(made[bound]) if made[bound] == int(made[bound]) else made[bound]
    if isinstance(made.get("pattern"), str):
        made["pattern"] = words.to_read(made["pattern"])
    return made


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


def _sections(model: type[Settings], prefix: str, *, listed: bool = False) -> Iterator[str]:
    """A table of one settings class, unless it is `listed` already, then those of the components it chooses from."""
    rows = list(_rows(model, prefix))
    if rows and not listed:
        yield _table(rows)
    for key, field in words.fields(model).items():
        choices = words.components(field.annotation)
        for name, component in choices.items():
            yield f"### `{prefix}{key}: {{name: {name}}}`"
            yield (component.__doc__ or "").strip()
            yield from _sections(component, f"{prefix}{key}.")
        inner = words.model_of(field.annotation)
        if inner is not None and not choices:
            yield from _sections(inner, f"{prefix}{key}.", listed=True)


def _table(rows: list[tuple[str, str, str, str]]) -> str:
    header = ["| key | what may stand there | default | meaning |", "|---|---|---|---|"]
    return "\n".join(header + [f"| {' | '.join(_escape(cell) for cell in row)} |" for row in rows])


def _rows(model: type[Settings], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    for key, field in words.fields(model).items():
        if len(words.choices(field.annotation)) == 1 and key == "name" and prefix:
            continue
        inner = words.model_of(field.annotation)
        if inner is not None and not words.components(field.annotation):
            yield from _rows(inner, f"{prefix}{key}.")
        else:
            yield f"`{prefix}{key}`", words.expected(field.annotation), _default(field), field.help


def _default(field: words.Key) -> str:
    if field.is_required:
        return "required"
    value = field.default
    if isinstance(value, Settings):
        value = {"name": value.name} if hasattr(value, "name") else {}
    return f"`{json.dumps(value, default=str)}`"


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    for path, text in generated().items():
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_text(text, encoding="utf-8")
