"""What editors and readers are told is what the reader of files accepts."""

import json
from pathlib import Path
from typing import get_args, get_origin

import jsonschema
import pytest
import yaml
from msgspec import Meta

from dtrain import component
from dtrain.errors import InputError
from dtrain.spec import document, words
from dtrain.spec.load import load_job
from dtrain.spec.schema import SPECS, generated, json_schema, reference

ROOT = Path(__file__).parents[2]
GOOD = {
    "name": "tiny",
    "model": {"name": component.names("models")[0]},
    "data": {"name": "text"},
    "batch": {"global": 8},
    "optimizer": {"name": "adamw", "lr": 0.1, "betas": [0.8, 0.9]},
    "train": {"steps": 10},
    "evaluate": {"every_steps": None},
}


@pytest.mark.parametrize("path", sorted(generated()))
def test_the_committed_files_are_what_the_code_generates(path):
    assert (ROOT / path).read_text(encoding="utf-8") == generated()[path], "run `make generate` and commit the result"


@pytest.mark.parametrize("kind", sorted(SPECS))
def test_the_schema_is_one(kind):
    jsonschema.Draft202012Validator.check_schema(json_schema(kind))


@pytest.mark.parametrize("kind", sorted(SPECS))
def test_the_shipped_files_follow_the_schema(kind):
    validator = jsonschema.Draft202012Validator(json_schema(kind))
    for path in sorted((ROOT / f"{kind}s").glob("*.yaml")):
        # PyYAML reads 1e-3 as text, editors (YAML 1.2) as a number: compare what dtrain itself reads.
        assert [error.message for error in validator.iter_errors(document.read(path).plain())] == [], path


@pytest.mark.parametrize(
    ("change", "good"),
    [
        ({}, True),
        ({"schedule": {"name": "wsd", "decay_steps": 5}}, True),
        ({"strategy": {"name": "ddp"}}, True),
        ({"strategy": {}}, False),
        ({"strategy": {"name": "dpp"}}, False),
        ({"model": {}}, False),
        ({"nam": "tiny"}, False),
        ({"name": "../x"}, False),
        ({"batch": {"global_size": 8}}, False),
        ({"batch": {"global": 0}}, False),
        ({"batch": {"global": "8"}}, False),
        ({"optimizer": {"name": "sgd", "lr": 0.1, "betas": [0, 0]}}, False),
        ({"optimizer": {"name": "adamw", "lr": 0.1, "betas": [0]}}, False),
        ({"optimizer": {"lr": 0.1}}, False),
        ({"train": {"steps": 10**10}}, False),
        ({"train": {"steps": 10, "precision": "fp8"}}, False),
        ({"train": None}, False),
    ],
    ids=str,
)
def test_schema_and_reader_agree(tmp_path, change, good):
    given = {**GOOD, **change}
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(given))
    assert jsonschema.Draft202012Validator(json_schema("job")).is_valid(given) is good
    if good:
        load_job(path)
    else:
        with pytest.raises(InputError):
            load_job(path)


def every_field(model, prefix=""):
    for key, field in words.fields(model).items():
        yield f"{prefix}{key}", field
        for inner in words.components(field.annotation).values() or filter(None, [words.model_of(field.annotation)]):
            yield from every_field(inner, f"{prefix}{key}.")


@pytest.mark.parametrize("kind", sorted(SPECS))
def test_every_option_is_explained_once_and_listed(kind):
    listed = reference(kind)
    for key, field in every_field(SPECS[kind]):
        if key.endswith(".name") and len(words.choices(field.annotation)) == 1:
            continue  # the heading of the component says it
        assert field.help, f"{key} has no sentence beneath it"
        assert field.help.rstrip().endswith("."), f"{key}: the help is not a sentence"
        if words.model_of(field.annotation) is None:
            assert f"| `{key}` |" in listed
    assert "any value" not in listed


def test_descriptions_reach_the_editor():
    schema = json_schema("job")
    assert "Optimizer steps" in json.dumps(schema["$defs"]["Train"]["properties"]["steps"])
    assert set(schema["properties"]["optimizer"]["discriminator"]["mapping"]) == {"adamw", "sgd"}


def scalars(annotation):
    for member in words.alternatives(annotation):
        if get_origin(words.bare(member)) in (list, tuple, dict):
            for inner in get_args(words.bare(member)):
                yield from scalars(inner)
        else:
            yield member


@pytest.mark.parametrize("kind", sorted(SPECS))
def test_no_number_is_without_end_and_no_pattern_lets_a_line_end_in(kind):
    """Infinity and what is no number pass no bound; Python's `$` would admit a name that ends with a line end."""
    for key, field in every_field(SPECS[kind]):
        for member in scalars(field.annotation):
            marks = [mark for mark in get_args(member)[1:] if isinstance(mark, Meta)]
            if words.bare(member) is float:
                ends = [(m.gt if m.ge is None else m.ge, m.lt if m.le is None else m.le) for m in marks]
                assert any(None not in end for end in ends), key
            for mark in marks:
                assert mark.pattern is None or mark.pattern.endswith((r"\Z", r"\Z)")), key
