"""The checks that rendered objects are held to, held themselves to what a real API server and operator said."""

import json
from pathlib import Path

import crd_schema
import pytest

RECORDINGS = crd_schema.CRDS.parent / "recordings"
pytestmark = pytest.mark.skipif(not RECORDINGS.is_dir(), reason=f"no recordings of a real cluster in {RECORDINGS}")


def _posted() -> list[Path]:
    """Recorded requests that would have created a RayJob, and were answered for what it said."""
    found = []
    for file in sorted((RECORDINGS / "http").glob("*.json")):
        request = json.loads(file.read_text())["request"]
        body = request.get("body")
        says_something = file.name.startswith(("201-", "400-unknown-field", "422-"))
        if says_something and request["method"] == "POST" and isinstance(body, dict) and body.get("kind") == "RayJob":
            found.append(file)
    return found


@pytest.mark.parametrize("file", _posted(), ids=lambda file: file.stem)
def test_it_takes_and_refuses_what_a_real_api_server_did(file):
    recording = json.loads(file.read_text())
    job = recording["request"]["body"]
    mistakes = crd_schema.schema_mistakes(job) + crd_schema.rule_mistakes(job) + crd_schema.metadata_mistakes(job)
    is_pruned = file.stem == "201-unknown-field-default-warn"  # strict here: what would be pruned is a mistake
    assert bool(mistakes) == (recording["status"] != 201 or is_pruned), mistakes


def _jobs() -> list[Path]:
    return sorted(path for path in (RECORDINGS / "transitions").glob("*") if list(path.glob("*-rayjob-ADDED-*.json")))


@pytest.mark.parametrize("folder", _jobs(), ids=lambda folder: folder.name[:24])
def test_it_refuses_what_the_operator_called_invalid_and_nothing_else(folder):
    job = json.loads(next(folder.glob("*-rayjob-ADDED-*.json")).read_text())["object"]
    was_invalid = any(folder.glob("01-rayjob-MODIFIED-none-ValidationFailed.json"))
    assert bool(crd_schema.operator_mistakes(job)) == was_invalid, crd_schema.operator_mistakes(job)


@pytest.mark.parametrize("kind", ["RayJob", "RayCluster"])
def test_every_rule_of_the_crd_is_known(kind):
    rules = {rule for rule in crd_schema.rules_of(crd_schema.crd(kind)) if "oldSelf" not in rule}
    assert rules
    assert rules <= set(crd_schema.RULES)
