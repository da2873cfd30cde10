"""A task of the user's own: a function that builds it. Planning reads the function's file and never runs it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta
from msgspec.structs import replace

from dtrain import code
from dtrain.data import DataShape
from dtrain.errors import InputError, TrainingError
from dtrain.models import ModelSize, Task
from dtrain.settings import Says, Settings

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dtrain.spec.job import Train

CALLED_WITH = ("data", "train")


class Options(Settings):
    """A task of your own; `model: ./task.py:build` is short for it."""

    build: Annotated[str, Meta(min_length=3, max_length=1024), Says(code.EXPECTED)]
    """Function that gives the task, called with (data, train, **options); a relative path starts at the job file's
    folder."""
    options: dict[str, Any] = {}
    """What the function is given by name."""
    path: Annotated[str, Meta(max_length=1024)] = ""
    """Folder that is put first on the import path; the job file's own when left out."""


def resolve(options: Options, folder: Path) -> Options:
    """The same with absolute paths. Raises `InputError` when file or function are not there, or not what is called."""
    try:
        path = code.absolute(options.path, folder) if options.path else folder.absolute().resolve()
        build = code.resolve(options.build, folder)
        file = code.source_file(build, path)
        if file is not None:
            code.check_call(build, file, CALLED_WITH, options.options)
    except InputError as error:
        raise InputError(f"model.build: {error.message}") from None
    return replace(options, build=build, path=str(path))


def own_code(options: Options) -> list[Path]:
    """The files of the user's own that resolved options name."""
    file = code.source_file(options.build, Path(options.path))
    return [file] if file is not None else []


def describe(options: Options, data: DataShape) -> ModelSize:
    """Nothing is known of it before it is built."""
    del options, data
    return ModelSize(num_parameters=0, flops_per_sample=0, activation_bytes_per_sample=0)


def build(options: Options, data: DataShape, train: "Train") -> Task:
    """What the user's function gives, as a task. torch's generator is seeded before: its weights are the seed's alone.

    Raises `TrainingError` for code that cannot be imported, and for what is no task.
    """
    import torch

    function = code.load(options.build, options.path)
    torch.manual_seed(train.seed)
    made = function(data, train, **options.options)
    task = _as_task(made)
    if task is None:
        raise TrainingError(
            f"{options.build} gave {_said(made)}; it must give a dtrain.Task, a network that has a method loss(batch),"
            " or a pair of a network and a function loss(network, batch)"
        )
    if not task.parts:
        raise TrainingError(f"{options.build} gave a task without parts; name its networks: Task({{'model': network}})")
    return task


def _as_task(made: Any) -> Task | None:
    from torch import nn

    from dtrain.models.networks.with_loss import WithLoss

    if isinstance(made, Task):
        return made
    if isinstance(made, nn.Module) and callable(getattr(made, "loss", None)):
        return Simple(WithLoss(made), _forward)
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module) and callable(made[1]):
        return Simple(*made)
    return None


def _forward(network: "nn.Module", batch: "Mapping[str, torch.Tensor]") -> "torch.Tensor":
    loss: torch.Tensor = network(batch)
    return loss


def _said(made: Any) -> str:
    from torch import nn

    if isinstance(made, nn.Module):
        return f"{type(made).__name__}, a network without a method loss(batch)"
    return f"a {type(made).__name__}" if made is not None else "nothing"


class Simple(Task):
    """One network and a function for its loss."""

    def __init__(self, network: "nn.Module", function: "Callable[[Any, Any], torch.Tensor]") -> None:
        super().__init__({"model": network})
        self._function = function

    def loss(self, phase: str, parts: "Mapping[str, nn.Module]", batch: "Mapping[str, torch.Tensor]") -> "torch.Tensor":
        """What the function says."""
        return self._function(parts["model"], batch)
