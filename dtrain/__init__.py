"""dtrain: one command carries a training job to a Ray cluster, shards it, and keeps it alive.

For your own code: `dtrain.Task` and what belongs to it, `dtrain.current_run()` in a script, `dtrain.submit(job)`.
Nothing is imported before it is asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dtrain.api import Run as Run
    from dtrain.api import submit as submit
    from dtrain.current import current_run as current_run
    from dtrain.data import DataShape as DataShape
    from dtrain.models import Phase as Phase
    from dtrain.models import Request as Request
    from dtrain.models import Sample as Sample
    from dtrain.models import Task as Task

__version__ = "0.1.0"

_HOMES = {
    "DataShape": "dtrain.data",
    "Phase": "dtrain.models",
    "Request": "dtrain.models",
    "Run": "dtrain.api",
    "Sample": "dtrain.models",
    "Task": "dtrain.models",
    "current_run": "dtrain.current",
    "submit": "dtrain.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dtrain' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
