"""What is decided: a `Plan` has nothing left open; `dtrain.planning` makes it.

A plan is the one thing that crosses process boundaries. It is immutable and goes through JSON unchanged.
"""

import os
from typing import TYPE_CHECKING, Literal

from dtrain.errors import InputError
from dtrain.settings import Settings, from_json, from_kept, to_json
from dtrain.spec.job import (
    Checkpoint,
    Entrypoint,
    Evaluate,
    Optimizer,
    Retry,
    Schedule,
    Train,
)
from dtrain.storage import Storage, is_remote

if TYPE_CHECKING:
    from dtrain.component import Named as Backend
    from dtrain.component import Named as Data
    from dtrain.component import Named as Model
    from dtrain.component import Named as Strategy
else:
    from dtrain.spec.cluster import Backend
    from dtrain.spec.job import Data, Model, Strategy


class Workers(Settings):
    """Who computes."""

    num_nodes: int
    per_node: int
    device: Literal["cpu", "cuda"]
    collectives: Literal["gloo", "nccl"]
    threads: int
    """CPU threads of one worker."""
    cpus_per_node: int
    """Cores a node reserves for the run."""

    @property
    def total(self) -> int:
        return self.num_nodes * self.per_node

    @property
    def resources(self) -> dict[str, float]:
        """What one node reserves, in Ray's words."""
        gpus = {"GPU": float(self.per_node)} if self.device == "cuda" else {}
        return {"CPU": float(self.cpus_per_node), **gpus}


class BatchArithmetic(Settings):
    """global_size = micro x accumulation x readers, always.

    A reader is a worker; under tensor parallelism, a group of workers that compute each of their samples together.
    """

    global_size: int
    micro: int
    accumulation: int

    @property
    def num_readers(self) -> int:
        return self.global_size // (self.micro * self.accumulation)

    def check(self, num_readers: int) -> None:
        """Raises `InputError` when the arithmetic does not hold for `num_readers`; asked at every start."""
        if self.micro * self.accumulation * num_readers != self.global_size:
            raise InputError(
                f"batch.global {self.global_size} is not micro {self.micro} x accumulation {self.accumulation}"
                f" x {num_readers} workers; plan the job again for this many workers"
            )


class Arithmetic(Settings):
    """Sizes worth knowing before the first step."""

    num_parameters: int
    flops_per_step: int
    tokens_per_step: int
    """Zero where the data has no tokens."""


class AnyPlan(Settings):
    """What is decided for every run."""

    format: Literal[1] = 1
    name: str
    cluster: str
    backend: Backend
    storage: str
    """Absolute folder that holds the runs, or the URI of one in a bucket."""
    retry: Retry
    workers: Workers
    code: dict[str, str] = {}
    """Files of the user's own that the job names, and the SHA-256 of each when the plan was made."""
    notes: tuple[str, ...] = ()
    """What was left open in the files, what it was resolved to, and why."""
    warnings: tuple[str, ...] = ()

    @property
    def num_steps(self) -> int:
        """Steps of the whole run; 0 where only the script knows."""
        return 0

    def to_json(self) -> str:
        return to_json(self)


class ScriptPlan(AnyPlan):
    """A run of a script of the user's own, decided."""

    entrypoint: Entrypoint
    folder: str
    """Where the script is started: the folder in which the command was given."""


class Plan(AnyPlan):
    """A run of a task, decided."""

    model: Model
    data: Data
    strategy: Strategy
    optimizer: Optimizer
    schedule: Schedule
    train: Train
    evaluate: Evaluate
    checkpoint: Checkpoint
    batch: BatchArithmetic
    arithmetic: Arithmetic

    @property
    def num_steps(self) -> int:
        return self.train.steps

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        return from_json(text, cls)


def read_plan(data: bytes, where: str) -> Plan | ScriptPlan:
    """The plan that was put aside at `where`. Raises `StorageError` for what is damaged, or another dtrain's."""
    is_script = "entrypoint" in from_kept(data, dict, where)
    return from_kept(data, ScriptPlan, where) if is_script else from_kept(data, Plan, where)


def plan_of(place: Storage, run_id: str) -> Plan | ScriptPlan:
    """The plan of a run that is kept there. Raises `NotThere` when there is none."""
    return read_plan(place.read(f"{run_id}/plan.json")[0], f"{place.uri}/{run_id}/plan.json")


def storage_of(place: str) -> str:
    """Where a cluster file's `storage` is: an absolute folder, or the URI as it is."""
    return place.rstrip("/") if is_remote(place) else os.path.abspath(os.path.expanduser(place))
