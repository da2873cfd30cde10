"""The committed plans are those that the code makes."""

from pathlib import Path

import plans
import pytest

from dtrain.planning import make_plan
from dtrain.spec.load import load_cluster, load_job


@pytest.mark.parametrize(("job", "machine"), plans.cases(), ids=lambda value: getattr(value, "stem", value))
def test_a_plan_is_the_committed_one(job: Path, machine: str) -> None:
    committed = plans.golden(job, machine).read_text()
    assert plans.text(job, machine) == committed, "run `make generate`, read the difference, commit it"


def test_there_is_a_plan_for_each_case_and_no_other() -> None:
    jobs = {job.stem for job in (plans.ROOT / "jobs").glob("*.yaml")}
    assert jobs >= plans.FOR_GPUS | plans.FOR_BOTH
    assert set(Path(plans.__file__).parent.glob("*.json")) == {plans.golden(*case) for case in plans.cases()}


@pytest.mark.parametrize("job", sorted(plans.FOR_GPUS))
def test_a_job_for_gpus_can_be_planned_without_them(job: str) -> None:
    place = load_cluster(plans.ROOT / "clusters" / "eight_gpus.yaml")
    plan = make_plan(load_job(plans.ROOT / "jobs" / f"{job}.yaml"), place, plans.MACHINES["two-cores"])
    assert (plan.workers.total, plan.workers.device, plan.workers.collectives) == (8, "cuda", "nccl")
    assert plan.warnings == ()
