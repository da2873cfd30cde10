"""Recurrent networks: RNN, GRU and LSTM, for series and for tokens."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta

from dtrain.data import DataShape
from dtrain.errors import InputError, TrainingError
from dtrain.models import ModelSize, Request, Sample, Task
from dtrain.models.language import LanguageModel
from dtrain.settings import PositiveInt, Settings, default

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dtrain.models.networks.rnn import SeriesNetwork
    from dtrain.spec.job import Train

GATES = {"rnn": 1, "gru": 3, "lstm": 4}
"""Matrices of a cell, each of which reads the input and the state."""
ONLY_FOR = {
    "bidirectional": "series",
    "from_last_value": "series",
    "tie_weights": "tokens",
    "label_smoothing": "tokens",
}
"""Options that mean nothing for other data."""


class Options(Settings):
    """A recurrent network that predicts the next values of a series, or the next token."""

    cell: Literal["rnn", "gru", "lstm"] = "lstm"
    """What a layer is made of: plain recurrence (Elman, 1990), gated recurrent units, or long short-term memory."""
    num_layers: Annotated[PositiveInt, Meta(le=1024)] = 2
    """Layers, each reading what the one before made."""
    width: Annotated[PositiveInt, Meta(le=2**16)] = 256
    """Numbers that a layer remembers, in each direction."""
    bidirectional: bool = False
    """Read each sample in both directions (series)."""
    dropout: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.0
    """Share of the numbers that a layer made dropped while training."""
    from_last_value: bool = True
    """Predict how far the next values are from the last one, rather than the values themselves (series)."""
    tie_weights: bool = False
    """Use one matrix to read tokens in and to predict them (tokens)."""
    label_smoothing: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.0
    """Share of a target that is spread evenly over all tokens while training (tokens)."""

    @property
    def made(self) -> int:
        """Numbers that a layer gives for each time step."""
        return self.width * (2 if self.bidirectional else 1)


def describe(options: Options, data: DataShape) -> ModelSize:
    """Parameters, floating point operations and activations of one sample.

    Raises `InputError` for data it cannot learn from, and for options that mean nothing for this data.
    """
    _check(options, data)
    gates, made, length = GATES[options.cell], options.made, data.sequence_length
    sizes = [data.num_features if data.kind == "series" else options.width] + [made] * (options.num_layers - 1)
    products = sum(made * gates * (size + options.width) for size in sizes)
    # Torch's cells have two biases a gate, one beside each matrix.
    num_parameters = products + options.num_layers * made * gates * 2
    # Kept for backward: a layer's input, its gates, its states.
    kept = length * sum(size + (gates + 2) * made for size in sizes)
    if data.kind == "series":
        head = made * data.horizon
        num_parameters += head + data.horizon
        flops = 6 * (length * products + head)
    else:
        head = data.vocabulary_size * options.width
        num_parameters += head * (1 if options.tie_weights else 2)
        flops = 6 * length * (products + head)
        kept += 2 * length * options.width
    return ModelSize(num_parameters=num_parameters, flops_per_sample=flops, activation_bytes_per_sample=4 * kept)


def build(options: Options, data: DataShape, train: "Train") -> Task:
    """The task that the data asks for, with weights that are a function of `train.seed` alone."""
    import torch

    from dtrain.models.networks import rnn
    from dtrain.models.networks.initial import on_cpu

    _check(options, data)
    network: Any
    with torch.device("meta"):
        network = (rnn.SeriesNetwork if data.kind == "series" else rnn.TokenNetwork)(options, data)
    on_cpu(network)
    rnn.initialise(network, options, train.seed)
    if data.kind == "series":
        return Forecaster(network, options.from_last_value)
    return LanguageModel(network, network.stack.layers, options.label_smoothing)


def _check(options: Options, data: DataShape) -> None:
    if data.kind not in ("series", "tokens"):
        raise InputError(
            f"model rnn learns from a series or tokens, not from {data.kind}; use data: {{name: series}} or"
            " {name: text}"
        )
    for name, kind in ONLY_FOR.items():
        if data.kind != kind and getattr(options, name) != default(Options, name):
            raise InputError(f"model.{name} is for {kind}, and the data holds {data.kind}; leave it out")


class Forecaster(Task):
    """Predicts the next values of a series: mean squared error."""

    def __init__(self, network: "SeriesNetwork", from_last_value: bool) -> None:
        super().__init__({"model": network})
        self._network, self._from_last_value = network, from_last_value

    def loss(self, phase: str, parts: "Mapping[str, nn.Module]", batch: "Mapping[str, torch.Tensor]") -> "torch.Tensor":
        """Mean squared error of `batch`: inputs [b, t, f], last [b], targets [b, horizon]."""
        del phase
        return (self.predict(parts, batch) - batch["targets"]).square().mean()

    def predict(self, parts: "Mapping[str, nn.Module]", batch: "Mapping[str, torch.Tensor]") -> "torch.Tensor":
        """The next values, fp32 [b, horizon]."""
        made = parts["model"](batch["inputs"]).float()
        if not self._from_last_value:
            return made
        if "last" not in batch:
            raise TrainingError(
                "a batch of this series has no `last`, the value before the targets, from which differences are"
                " predicted; add it to the data, or set model.from_last_value: false"
            )
        return made + batch["last"][:, None].to(made.device)

    def evaluate(
        self, parts: "Mapping[str, nn.Module]", batch: "Mapping[str, torch.Tensor]"
    ) -> "dict[str, torch.Tensor]":
        """Errors of one held-out batch, and those of saying the last value again, where the data knows it."""
        import torch

        targets = batch["targets"].double()
        errors = self.predict(parts, batch).double() - targets
        sums = {
            "squared_error": errors.square().sum(),
            "absolute_error": errors.abs().sum(),
            "targets": torch.tensor(targets.numel(), device=targets.device),
        }
        if "last" in batch:
            sums["naive_squared_error"] = (batch["last"].double()[:, None] - targets).square().sum()
        return sums

    def finish_evaluation(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Mean squared error (the loss), mean absolute error, and the squared error of saying the last value again."""
        num = sums["targets"]
        metrics = {"loss": sums["squared_error"] / num, "mean_absolute_error": sums["absolute_error"] / num}
        if "naive_squared_error" in sums:
            metrics["naive_loss"] = sums["naive_squared_error"] / num
        return metrics

    def blocks(self) -> "list[nn.Module]":
        """The layers."""
        return list(self._network.stack.layers)

    def sample(self, source: Any, request: Request) -> Sample:
        """A held-out stretch of time, chosen by the seed: what was predicted, and what came."""
        import numpy as np
        import torch

        index = np.array([request.seed % source.held_out.num_samples], dtype=np.int64)
        arrays = source.held_out.batch(index, np.zeros(1, dtype=np.uint64))
        device = self._network.head.weight.device
        batch = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
        with torch.no_grad():
            predicted = self.predict(self.parts, batch)[0].cpu().numpy()
        rows = {"last": arrays["last"]} if "last" in arrays else {}
        rows |= {"predicted": predicted, "came": arrays["targets"][0]}
        in_units = getattr(source, "to_target", np.asarray)
        lines = [f"{name:<10}" + "".join(f" {x:8.2f}" for x in in_units(values)) for name, values in rows.items()]
        return Sample("\n".join(lines))
