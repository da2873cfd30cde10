"""Show what a model has learnt: `dtrain sample`, and the sample at the end of a run."""

from typing import TYPE_CHECKING, Any

from dtrain import component
from dtrain.errors import InputError, StorageError

if TYPE_CHECKING:
    from dtrain.runs import Run

PROMPT, LENGTH, TEMPERATURE = "def ", 160, 0.7


def showpiece(task: Any, source: Any, seed: int) -> str | None:
    """The sample at the end of a run; None for a task that has none to give."""
    try:
        return str(task.sample(source, PROMPT, LENGTH, TEMPERATURE, seed))
    except InputError:
        return None


def generate(run: "Run", prompt: str, length: int, temperature: float, seed: int) -> str:
    """A sample from the newest valid checkpoint of a run.

    Raises `StorageError` when the run has no valid checkpoint, `InputError` when its model cannot make samples.
    """
    from dtrain.checkpoint import store
    from dtrain.data.cache import folder as cache_folder

    plan = run.plan
    problems: list[str] = []
    found = store.newest_valid(run.checkpoints, problems.append)
    if found is None:
        reason = "; ".join(problems) or "none was written yet"
        raise StorageError(f"run {run.id} has no valid checkpoint to sample from ({reason})")
    data, model = component.load("data", plan.data.name), component.load("models", plan.model.name)  # type: ignore[attr-defined]
    source = data.open(plan.data, cache_folder())
    task = model.build(plan.model, data.describe(plan.data), plan.train)
    state = {
        f"model.{part}.{key}": tensor
        for part, module in task.parts.items()
        for key, tensor in _once(module.state_dict(keep_vars=True)).items()
    }
    store.read_into(found[0], state)
    for module in task.parts.values():
        module.eval()
    return str(task.sample(source, prompt, length, temperature, seed))


def _once(state: dict[str, Any]) -> dict[str, Any]:
    """Tied tensors under their first name only, as checkpoints hold them."""
    seen: set[int] = set()
    return {k: t for k, t in state.items() if not (id(t) in seen or seen.add(id(t)))}  # type: ignore[func-returns-value]
