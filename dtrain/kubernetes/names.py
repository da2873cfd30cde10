"""What the objects of a run are called, and the labels by which all of them are found. Pure."""

import re

from dtrain.errors import InputError

MAX_NAME = 47
"""A RayJob's longest name: the operator appends to it."""
MANAGED_BY = "app.kubernetes.io/managed-by"
SELECTOR = f"{MANAGED_BY}=dtrain"
"""Everything that dtrain has sent."""
RUN = "dtrain.dev/run"
"""Label: the run, as an object name."""
JOB = "dtrain.dev/job"
"""Label: the job that the run is of."""
CLUSTER = "dtrain.dev/cluster"
"""Label: the standing cluster."""
RUN_ID = "dtrain.dev/run-id"
"""Annotation: the run's id as it is spelled."""
STORAGE = "dtrain.dev/storage"
"""Annotation: where its folder is."""
PLAN = "dtrain.dev/plan"
"""Annotation: hash of its plan."""
VERSION = "dtrain.dev/version"
"""Annotation: the dtrain that sent it."""
_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")


def object_name(run_id: str) -> str:
    """The name of a run's objects. Raises `InputError` for an id that Kubernetes cannot spell."""
    name = run_id.replace("_", "-")
    if len(name) > MAX_NAME or not _NAME.fullmatch(name):
        raise InputError(
            f"{run_id!r} cannot be the name of a Ray job on Kubernetes, which begins with a letter and has at most"
            f" {MAX_NAME} of a-z, 0-9 and -; give the job another name"
        )
    return name


def run_labels(run_id: str) -> dict[str, str]:
    """On every object and every pod of a run."""
    return {**_common(), RUN: object_name(run_id)}


def cluster_labels(name: str) -> dict[str, str]:
    """On every object and every pod of a standing cluster."""
    return {**_common(), CLUSTER: name}


def _common() -> dict[str, str]:
    return {"app.kubernetes.io/name": "dtrain", MANAGED_BY: "dtrain"}
