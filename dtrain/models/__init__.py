"""What is trained. A model is one file here, found by its name, with three things in it:

- `Options`: its settings (a `dtrain.settings.Settings`);
- `describe(options, data) -> ModelSize`: its arithmetic, without torch;
- `build(options, data, train) -> Task`: the networks and how they learn, with weights that are a function of
  `train.seed` alone.

Where options name files, `resolve(options, folder) -> Options` takes relative paths from `folder`; where one of them
is the user's own code, `own_code(options) -> list[Path]` names it: a plan holds its hash.

The networks themselves, which need torch to be defined, live in `dtrain/models/networks/`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn


@dataclass(frozen=True)
class ModelSize:
    """What planning must know of a model before torch is loaded."""

    num_parameters: int
    """Trainable numbers, tied weights counted once; 0 when only building it can tell."""
    flops_per_sample: int
    """Floating point operations of forward and backward for one sample (backward counted as twice forward)."""
    activation_bytes_per_sample: int
    """Estimate of the memory one sample needs between forward and backward, in fp32."""
    parts: tuple[str, ...] = ("model",)
    """Names of its networks."""
    num_frozen: int = 0
    """Numbers that are held beside the trainable ones and never change."""


@dataclass(frozen=True)
class Phase:
    """One update: which parts it trains. A GAN has two phases, most models one."""

    name: str
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Request:
    """What a sample is asked for."""

    prompt: str = ""
    length: int = 160
    """Tokens to generate."""
    temperature: float = 0.7
    top_k: int | None = None
    count: int = 64
    """Pictures to make."""
    seed: int = 0


@dataclass(frozen=True)
class Sample:
    """What a model made: text, or pictures."""

    text: str = ""
    pictures: "np.ndarray | None" = None
    """uint8 [count, height, width, channels], 1 or 3 channels."""


class Task:
    """What the loop trains: networks (parts), updates (phases) and a loss for each of them.

    A model subclasses it and gives `loss`; the rest may be left as it is. `parts` given to a method are the same
    networks as the attribute, wrapped by the strategy: call those. A batch maps names to tensors whose first
    dimension is the micro batch, already on the device. Besides what the data holds there is `draws`: int64 [b], a
    random number a sample that depends on neither the number of workers nor the micro batch; noise made from it
    (`dtrain.models.networks.noise`) is the same however a run is spread.
    """

    parts: "dict[str, nn.Module]"
    phases: tuple[Phase, ...]
    shows_progress = False
    """Whether its sample is made at every evaluation, not only at the end: pictures that cost little."""

    def __init__(self, parts: "Mapping[str, nn.Module]", phases: Sequence[Phase] = ()) -> None:
        self.parts = dict(parts)
        self.phases = tuple(phases) or (Phase("train", tuple(self.parts)),)

    def loss(self, phase: str, parts: "Mapping[str, nn.Module]", batch: "Mapping[str, torch.Tensor]") -> "torch.Tensor":
        """Mean loss of the micro batch for one phase: a scalar with a gradient."""
        raise NotImplementedError(f"{type(self).__name__} has no loss(phase, parts, batch)")

    def evaluate(
        self, parts: "Mapping[str, nn.Module]", batch: "Mapping[str, torch.Tensor]"
    ) -> "dict[str, torch.Tensor]":
        """Sums (never means) over one held-out micro batch: scalars that add up over batches and workers."""
        import torch

        num = next(iter(batch.values())).shape[0]
        loss = self.loss(self.phases[0].name, parts, batch)
        return {"loss": loss.detach() * num, "samples": torch.tensor(float(num), device=loss.device)}

    def finish_evaluation(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Turn the sums over all held-out samples into metrics; `loss` must be among them, lower is better."""
        return {"loss": sums["loss"] / sums["samples"]}

    def blocks(self) -> "list[nn.Module]":
        """The repeated blocks of the networks: what is compiled, recomputed and sharded one by one."""
        return []

    def tensor_parallel(self) -> dict[str, str]:
        """How modules are split over several devices that compute one sample together; empty for a task that is not.

        From patterns (`fnmatch`) of module names, `<part>.<name>`, to how a module is split:

        - `column`: a linear layer, by its outputs (rows of `weight`, and `bias`): each device computes some of them;
        - `row`: a linear layer, by its inputs (columns of `weight`): what the devices computed is added up;
        - `shared`: whole on every device, which applies it to its own slice: its gradient is the sum over devices.

        All else is whole on every device and computes the same on each. A pattern may match nothing.
        """
        return {}

    def is_kept(self, name: str) -> bool:
        """Whether the tensor `<part>.<name>` must survive; False for what `build` makes again, the same each time."""
        return True

    def learning_rate_share(self, phase: Phase, name: str) -> float:
        """Share of the learning rate that the parameter `<part>.<name>` trains with in `phase`."""
        return 1.0

    def sample(self, source: Any, request: Request) -> Sample | None:
        """What the networks make now (in evaluation mode, on the device of their weights); None for nothing to show.

        Every worker calls it with the same request. Raises `InputError` for a request that this model cannot meet.
        """
        return None
