"""Multilayer perceptrons, for tables and small pictures."""

import itertools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta

from dtrain.data import DataShape
from dtrain.errors import InputError
from dtrain.models import ModelSize, Task
from dtrain.models.classifier import Classifier, Regularisation

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dtrain.models.networks.mlp import MLP
    from dtrain.spec.job import Train


class Options(Regularisation):
    """Fully connected layers that tell classes apart or predict a number, from tables or small pictures."""

    hidden: Annotated[tuple[Annotated[int, Meta(gt=0, le=2**20)], ...], Meta(max_length=1024)] = (256, 256)
    """Sizes of the hidden layers, first to last; an empty list makes the model linear."""
    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    """After every hidden layer."""
    dropout: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.0
    """Share of a hidden layer's numbers dropped while training."""


def describe(options: Options, data: DataShape) -> ModelSize:
    """Parameters, floating point operations and activations of one sample.

    Raises `InputError` for other than tables and images.
    """
    num_inputs, num_outputs = _ends(options, data)
    sizes = (num_inputs, *options.hidden, num_outputs)
    products = sum(before * after for before, after in itertools.pairwise(sizes))
    # A hidden layer keeps what the next one reads; relu and tanh know their slope from it, others keep what they read.
    layer = 3 if options.dropout else 1 if options.activation in ("relu", "tanh") else 2
    return ModelSize(
        num_parameters=products + sum(sizes[1:]),
        flops_per_sample=6 * products,
        activation_bytes_per_sample=4 * (num_inputs + layer * sum(options.hidden)),
    )


def build(options: Options, data: DataShape, train: "Train") -> Task:
    """The task of telling classes or a number, with weights that are a function of `train.seed` alone."""
    import torch

    from dtrain.models.networks.initial import on_cpu
    from dtrain.models.networks.mlp import MLP

    num_inputs, num_outputs = _ends(options, data)
    with torch.device("meta"):
        network = MLP(options, num_inputs, num_outputs)
    on_cpu(network)
    network.initialise(train.seed)
    if data.num_classes:
        return Classifier(network, network.layers, options.label_smoothing, options.mixup)
    return Regressor(network)


def _ends(options: Options, data: DataShape) -> tuple[int, int]:
    """Numbers that go in and come out."""
    if data.kind == "table":
        num_inputs = data.num_features
    elif data.kind == "images":
        num_inputs = math.prod((data.channels, data.height, data.width))
    else:
        raise InputError(
            f"model mlp learns from a table or images, not from {data.kind}; use data: {{name: table}} or"
            " {name: images}"
        )
    if data.num_classes == 0:
        if data.kind == "images":
            raise InputError("model mlp needs a class for each of the images, and data.source has none; label them")
        for name in ("label_smoothing", "mixup"):
            if getattr(options, name):
                raise InputError(f"model.{name} is for classes, and the target column holds a number; leave it out")
    return num_inputs, max(data.num_classes, 1)


class Regressor(Task):
    """Predicts one number: mean squared error."""

    def __init__(self, network: "MLP") -> None:
        super().__init__({"model": network})
        self._network = network

    def loss(self, phase: str, parts: "Mapping[str, nn.Module]", batch: "Mapping[str, torch.Tensor]") -> "torch.Tensor":
        """Mean squared error of `batch`: features [b, f] and targets [b]."""
        del phase
        return (parts["model"](batch["features"])[:, 0].float() - batch["targets"]).square().mean()

    def evaluate(
        self, parts: "Mapping[str, nn.Module]", batch: "Mapping[str, torch.Tensor]"
    ) -> "dict[str, torch.Tensor]":
        """Squared errors, and what is needed to hold them against the spread of the targets."""
        import torch

        targets = batch["targets"].double()
        errors = parts["model"](batch["features"])[:, 0].double() - targets
        return {
            "squared_error": errors.square().sum(),
            "absolute_error": errors.abs().sum(),
            "targets": targets.sum(),
            "squared_targets": targets.square().sum(),
            "samples": torch.tensor(len(targets), device=targets.device),
        }

    def finish_evaluation(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Mean squared error (the loss), mean absolute error, and the share of the variance that is explained."""
        num = sums["samples"]
        loss = sums["squared_error"] / num
        metrics = {"loss": loss, "mean_absolute_error": sums["absolute_error"] / num}
        variance = sums["squared_targets"] / num - (sums["targets"] / num) ** 2
        if variance > 0:
            metrics["r2"] = 1.0 - loss / variance
        return metrics

    def blocks(self) -> "list[nn.Module]":
        """The hidden layers."""
        return list(self._network.layers)
