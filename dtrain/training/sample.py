"""Show what a model has learnt: `dtrain sample`, and the sample at the end of a run."""

from typing import TYPE_CHECKING, Any

from dtrain import component
from dtrain.errors import InputError, StorageError
from dtrain.models import Request, Sample, Task

if TYPE_CHECKING:
    from dtrain.runs import Run

PROMPT = "def "


def showpiece(task: Task, source: Any, seed: int) -> Sample | None:
    """The sample at the end of a run; None for a task that has none to give."""
    import torch

    try:
        # Texts grow by a token at a time, and compiled blocks would be compiled for each length anew: minutes.
        with torch.compiler.set_stance("force_eager"):
            return made(task, source, Request(prompt=PROMPT, seed=seed))
    except InputError:
        return None


def made(task: Task, source: Any, request: Request) -> Sample | None:
    """What a task makes on request, its networks in evaluation mode. Raises `InputError` as the task does."""
    for part in task.parts.values():
        part.eval()
    sample = task.sample(source, request)
    for part in task.parts.values():
        part.train()
    return sample


def generate(run: "Run", request: Request) -> Sample:
    """A sample from the newest valid checkpoint of a run, made by its averaged weights where it keeps them.

    Raises `StorageError` when the run has no valid checkpoint, `InputError` when its model cannot make samples.
    """
    from dtrain.checkpoint import remote, store
    from dtrain.data.cache import folder as cache_folder
    from dtrain.runs.away import RemoteRun
    from dtrain.training.averaging import PREFIX as AVERAGE

    plan = run.task_plan
    problems: list[str] = []
    if isinstance(run, RemoteRun):
        found = remote.newest_valid(run.storage, run.id, problems.append, run.checkpoints)
    else:
        found = store.newest_valid(run.checkpoints, problems.append)
    if found is None:
        reason = "; ".join(problems) or "none was written yet"
        raise StorageError(f"run {run.id} has no valid checkpoint to sample from ({reason})")
    data, model = component.load("data", plan.data.name), component.load("models", plan.model.name)  # type: ignore[attr-defined]
    source = data.open(plan.data, cache_folder())
    task = model.build(plan.model, data.describe(plan.data), plan.train)
    prefix = AVERAGE if plan.train.ema else ""
    state = {
        f"{prefix if tensor.is_floating_point() else ''}model.{part}.{key}": tensor
        for part, module in task.parts.items()
        for key, tensor in _once(module.state_dict(keep_vars=True)).items()
        if task.is_kept(f"{part}.{key}")
    }
    store.read_into(found[0], state)
    sample = made(task, source, request)
    if sample is None:
        raise InputError(f"model {plan.model.name} has nothing to show; `dtrain metrics {run.id}` shows its figures")
    return sample


def _once(state: dict[str, Any]) -> dict[str, Any]:
    """Tied tensors under their first name only, as checkpoints hold them."""
    seen: set[int] = set()
    return {k: t for k, t in state.items() if not (id(t) in seen or seen.add(id(t)))}  # type: ignore[func-returns-value]
