"""The committed plans are those that the code makes."""

from pathlib import Path

import plans
import pytest


@pytest.mark.parametrize(("job", "machine"), plans.cases(), ids=lambda value: getattr(value, "stem", value))
def test_a_plan_is_the_committed_one(job: Path, machine: str) -> None:
    committed = plans.golden(job, machine).read_text()
    assert plans.text(job, machine) == committed, "run `make generate`, read the difference, commit it"
