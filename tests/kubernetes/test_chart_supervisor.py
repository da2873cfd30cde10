"""The supervisor's pod: it is ended when it gives no sign of life, and sees runs as they see themselves."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chart import KIND, MINIMAL, RUNS, Object, Values, cluster_file, named, objects, run_objects

from dtrain.cli.cluster import supervise
from dtrain.kubernetes import verbs

ALIVE = "/tmp/alive"
ROUND_S, GRACE_S = 3600, 7200
SLOW: Values = {"supervisor": {"everySeconds": ROUND_S}, "clusterFile": {"backend": {"termination_grace_s": GRACE_S}}}
SECURITY: Values = {"user": 1000660000, "group": 2000}


def _pod(values: Values) -> Object:
    return dict(named(objects(values), "Deployment", "dtrain-supervisor", RUNS)["spec"]["template"]["spec"])


def _probed(values: Values, file: Path) -> int:
    """The exit code of the probe, asked about this file."""
    program, *words = _pod(values)["containers"][0]["livenessProbe"]["exec"]["command"]
    assert program == "python", "which the image has"
    words = [word.replace(ALIVE, str(file)) for word in words]
    return subprocess.run([sys.executable, *words], stderr=subprocess.DEVNULL).returncode


@pytest.mark.parametrize(
    ("values", "alive_s", "dead_s"),
    [({}, 5 * 30 + 120, 20 * 60), (SLOW, 3 * ROUND_S + GRACE_S, 7 * ROUND_S + GRACE_S)],
    ids=["defaults", "slow"],
)
def test_it_is_ended_when_it_has_not_looked_for_several_rounds(
    values: Values, alive_s: float, dead_s: float, tmp_path: Path
) -> None:
    alive = tmp_path / "alive"
    assert _probed(values, alive) == 1, "no file, no life"
    alive.touch()
    assert _probed(values, alive) == 0
    for age_s, code in ((alive_s, 0), (dead_s, 1)):
        os.utime(alive, (time.time() - age_s, time.time() - age_s))
        assert _probed(values, alive) == code


@pytest.mark.parametrize(("values", "grace_s"), [({}, 120), (SLOW, GRACE_S)], ids=["defaults", "slow"])
def test_an_upgrade_gives_it_the_time_that_it_may_wait_for_the_pods_of_a_run(values: Values, grace_s: float) -> None:
    assert _pod(values)["terminationGracePeriodSeconds"] > grace_s + verbs.GONE_S


def test_it_touches_the_file_that_is_probed() -> None:
    (container,) = _pod({})["containers"]
    command = container["command"]
    assert command[:2] == ["dtrain", "supervise"]
    asked = supervise.make_context("supervise", list(command[2:])).params
    assert (str(asked["alive"]), asked["every_s"], asked["once"]) == (ALIVE, 30.0, False)
    assert ALIVE in container["livenessProbe"]["exec"]["command"][-1]
    assert {"name": "scratch", "mountPath": "/tmp"} in container["volumeMounts"]


@pytest.mark.parametrize(("given", "ids"), [({}, (1000, 1000)), ({"security": SECURITY}, (1000660000, 2000))])
def test_it_may_write_the_folders_of_runs(given: Values, ids: tuple[int, int], tmp_path: Path) -> None:
    values = KIND | {"clusterFile": {"backend": given}}
    outer = _pod(values)["securityContext"]
    assert (outer["runAsUser"], outer["runAsGroup"], outer["fsGroup"]) == (*ids, ids[1])
    head = run_objects(cluster_file(values, tmp_path))[0]["spec"]["rayClusterSpec"]["headGroupSpec"]
    theirs = head["template"]["spec"]["securityContext"]
    assert {key: theirs[key] for key in outer} == outer
    assert named(objects(values), "Pod", "dtrain-doctor")["spec"]["securityContext"] == outer


def test_it_finds_the_storage_by_the_environment_of_runs(tmp_path: Path) -> None:
    backend = {
        "env": {"AWS_REGION": "eu-north-1", "HOME": "/home/ann"},
        "env_from": ["more", "keys"],
        "volumes": [{"mount": "/data", "claim": "data"}, {"mount": "/etc/aws", "secret": "aws-config"}],
    }
    bucket = MINIMAL["storage"] | {"existingSecret": "keys"}
    values: Values = {"storage": bucket, "clusterFile": {"backend": backend}}
    pod = _pod(values)
    (container,) = pod["containers"]
    assert {one["name"]: one["value"] for one in container["env"]} == {
        "HOME": "/tmp",
        "PYTHONUNBUFFERED": "1",
        "AWS_REGION": "eu-north-1",
    }
    assert [one["secretRef"]["name"] for one in container["envFrom"]] == ["keys", "more"]
    head = run_objects(cluster_file(values, tmp_path))[0]["spec"]["rayClusterSpec"]["headGroupSpec"]
    theirs = head["template"]["spec"]["containers"][0]
    assert theirs["envFrom"] == container["envFrom"]
    assert _files_of_secrets(pod) == _files_of_secrets(head["template"]["spec"]) == {"/etc/aws": "aws-config"}
    assert [volume for volume in pod["volumes"] if "persistentVolumeClaim" in volume] == [], "data are not looked at"


def _files_of_secrets(pod: Object) -> dict[str, str]:
    """The Secret that a pod mounts, by the folder."""
    secrets = {one["name"]: one["secret"]["secretName"] for one in pod["volumes"] if "secret" in one}
    mounts = [one for one in pod["containers"][0]["volumeMounts"] if one["name"] in secrets]
    assert all(one["readOnly"] for one in mounts)
    return {one["mountPath"]: secrets[one["name"]] for one in mounts}


def test_it_puts_up_with_a_taint_for_a_while_if_told_so() -> None:
    taint = {"key": "maintenance", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 60}
    assert _pod({"supervisor": {"tolerations": [taint]}})["tolerations"] == [taint]
