"""From submit to the end and beyond, whole: the real command, the real driver on a real Ray cluster, the shipped file.

Only the API server and the operator behind it are stand-ins, and processes of this machine are the pods.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_server import ApiServer
from scripted_operator import ScriptedOperator
from story import Story

sys.path.append(str(Path(__file__).parents[1] / "unit"))
from s3_server import served

QUICKLY_GONE = "cluster.backend.ttl_after_finished_s=1"


@pytest.fixture
def in_bucket(tmp_path: Path) -> Iterator[Story]:
    """Runs are kept in a bucket."""
    with ApiServer() as api, ScriptedOperator(api) as operator, served() as s3:
        story = Story(api, operator, tmp_path, f"s3://{s3.bucket}/runs")
        story.give_credentials({name: value for name, value in os.environ.items() if name.startswith("AWS_")})
        with story.told():
            yield story


@pytest.fixture
def in_folder(tmp_path: Path) -> Iterator[Story]:
    """Runs are kept in a folder of the nodes."""
    (tmp_path / "nodes").mkdir()
    with ApiServer() as api, ScriptedOperator(api) as operator:
        story = Story(api, operator, tmp_path, str(tmp_path / "nodes" / "runs"))
        story.share_folder()
        with story.told():
            yield story


def has_checkpoint(run) -> bool:
    run.refresh("checkpoints/")
    return any(run.checkpoints.glob("step-*/COMMITTED"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_outlives_its_head_and_can_be_read_when_its_cluster_is_gone(in_bucket):
    story = in_bucket
    # The answer to the submit is lost, and asked for again: one run all the same.
    story.api.fail(method="POST", path=r".*/rayjobs", cut="after")
    name = story.submit("train.steps=600", "checkpoint.every_steps=50", QUICKLY_GONE)
    assert [made["metadata"]["name"] for made in story.api.list("RayJob")] == [name]

    assert name in story.look("ps")
    seen = story.status(name)["cluster"]
    assert seen["phase"] in ("starting", "running"), seen
    assert seen["why"] or seen["phase"] == "running", seen
    followed = story.follow("logs", name, "-f")
    story.until(name, has_checkpoint)
    there = "\n".join(story.left_behind())
    assert all(
        what in there for what in (f"RayJob {name}", "raylet", "/dev/shm/dtrain-", f"{story.operator.root}/p")
    ), there

    os.kill(story.operator.head_pid(name), signal.SIGKILL)
    story.until(name, lambda run: run.record.state == "succeeded")

    ended = story.status(name)
    first, second = ended["attempts"]
    assert (ended["exit_code"], ended["step"], ended["submissions"]) == (0, 600, 2)
    assert first["cause"] == "the driver was lost"
    assert second["source"] == f"step-{second['from_step']:08d}" and 50 <= second["from_step"] < 600
    assert ended["outcome"]["metrics"]["loss"] < 3.5
    story.until_rayjob(name, lambda status: status.get("jobDeploymentStatus") == "Complete")
    assert story.followed_to_the_end() == [0]
    told = followed.read_text()
    assert "attempt 1, from step 0" in told and f"attempt 2, from step {second['from_step']}" in told

    kubectl = ["kubectl", "delete", "rayjob", name, "--namespace", "dtrain"]
    subprocess.run(kubectl, check=True, capture_output=True, env=story.environment, timeout=60)
    story.until_gone()
    assert story.status(name) == {key: value for key, value in ended.items() if key != "cluster"}
    assert sorted(story.look("logs", name).splitlines()) == sorted(told.splitlines())
    assert "succeeded: all 600 steps done" in story.look("logs", name, "--driver")
    assert "600" in story.look("metrics", name).splitlines()[-1]
    assert story.left_behind() == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_whose_cluster_has_ended_is_handed_over_again_and_stopped(in_folder):
    story = in_folder
    name = story.submit("train.steps=100000", "checkpoint.every_steps=50", QUICKLY_GONE)
    story.until(name, has_checkpoint)
    assert "looking over" in story.look("supervise", "--once")
    assert story.run(name).record.submissions == 1, "a run that is under way is left alone"
    uid = story.rayjob(name)["metadata"]["uid"]

    os.kill(story.run(name).record.driver_pid, signal.SIGKILL)
    story.until_rayjob(name, lambda status: status.get("jobDeploymentStatus") == "Failed")
    assert "handing it over again" in story.look("supervise", "--once")
    assert story.rayjob(name)["metadata"]["uid"] != uid
    story.until(name, lambda run: len(run.record.attempts) == 2 and run.record.state == "running")
    assert story.run(name).record.attempts[1].from_step >= 50
    assert sum(event["event"] == "driver-lost" for event in story.run(name).events()) == 1, "one loss is counted once"

    assert "stopped" in story.look("stop", name)
    ended = story.status(name)
    assert (ended["state"], ended["exit_code"], ended["submissions"]) == ("stopped", 130, 2)
    assert ended["checkpoints"][-1]["name"] == f"step-{ended['step']:08d}"
    assert story.look("supervise", "--once").count("\n") == 1, "a run that has ended is left alone"
    assert "has already ended: stopped" in story.look("stop", name)
    story.until_gone()  # the second stop clears what the first one's driver left on the cluster
    assert json.loads(story.look("ps", "--json"))[0]["state"] == "stopped"
    assert story.left_behind() == []
