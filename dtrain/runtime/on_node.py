"""A node's own folder of a run that lives in a bucket: made from storage, and carried back to it."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from dtrain import bundle, storage
from dtrain.plan import AnyPlan, ScriptPlan, plan_of
from dtrain.runtime.carrier import Carrier, pod_output
from dtrain.runtime.own_folder import OwnFolder, code_folder
from dtrain.storage import Storage
from dtrain.storage.lease import standing


def arrived_plan(place: Storage, run_id: str) -> AnyPlan:
    """The plan as it holds on this machine: the user's own code is fetched, and the plan names it where it lies."""
    plan = plan_of(place, run_id)
    arrived: AnyPlan = bundle.arrive(place, run_id, plan, code_folder(run_id))
    return arrived


class OnNode:
    """While it is open the node has its folder, and what is written there goes to storage."""

    def __init__(self, away: Mapping[str, Any], node: int) -> None:
        self._away, self._node = away, node
        self._place = storage.at(away["storage"])

    def __enter__(self) -> "OnNode":
        run_id = self._away["run"]
        self._own = OwnFolder(run_id, self._away["token"], str(self._node))
        try:
            self._prepare(run_id)
        except BaseException:
            self._own.remove()
            raise
        return self

    def _prepare(self, run_id: str) -> None:
        plan = arrived_plan(self._place, run_id)
        (self._own.path / "plan.json").write_text(plan.to_json())
        self._carrier = Carrier(
            self._place,
            run_id,
            self._own.path,
            self._is_mine,
            growing=[*self._logs(plan), *(["metrics.jsonl"] if self._node == 0 else [])],
            whole=["samples/*"],
            slow=["tensorboard/*"],
            mirrored=["checkpoints/**/*"] if isinstance(plan, ScriptPlan) else [],
            echo=pod_output(),
        )
        self._carrier.fetch()
        self._carrier.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._carrier.close()
        self._own.remove()

    @property
    def path(self) -> Path:
        return self._own.path

    @property
    def lock(self) -> int:
        """A descriptor that keeps the folder from being swept, for whoever works in it."""
        return self._own.lock

    def _logs(self, plan: AnyPlan) -> list[str]:
        first, num = self._node * plan.workers.per_node, plan.workers.per_node
        names = [f"{what}-{self._node}" for what in ("agent", "prepare", "writer")]
        names += [f"rank-{rank}" for rank in range(first, first + num)]
        return [f"logs/{name}.log" for name in names]

    def _is_mine(self) -> bool:
        found = standing(self._place, self._away["run"])
        return found is not None and found.token == self._away["token"]
