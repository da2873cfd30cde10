"""Autoencoders, plain and variational, for pictures and tables."""

import itertools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta

from dtrain.data import DataShape
from dtrain.errors import InputError
from dtrain.models import ModelSize, Request, Sample, Task
from dtrain.models.pictures import Size, decoder, encoder, levels
from dtrain.settings import Settings, default

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dtrain.models.networks.autoencoder import Autoencoder
    from dtrain.spec.job import Train


class Options(Settings):
    """Tells samples by a few numbers and makes them again; a variational one (VAE) also makes new ones."""

    latent_size: Annotated[int, Meta(gt=0, le=2**16)] = 32
    """Numbers that a sample is told by."""
    variational: bool = True
    """Learn a distribution of the latent numbers (VAE), so that new samples can be drawn."""
    kl_weight: Annotated[float, Meta(ge=0.0, le=1000.0)] = 1.0
    """What the latent distribution costs, as a multiple of its nats (beta-VAE); 1 bounds the likelihood. Variational
    only."""
    width: Annotated[int, Meta(gt=0, le=4096)] = 32
    """For images: channels at full size; they double with every halving, up to 16 times as many."""
    hidden: Annotated[tuple[Annotated[int, Meta(gt=0, le=2**20)], ...], Meta(max_length=1024)] = (256, 128)
    """For tables: sizes of the encoder's hidden layers; the decoder has them in reverse."""

    def __post_init__(self) -> None:
        if not self.variational and self.kl_weight != default(Options, "kl_weight"):
            raise ValueError(
                "kl_weight weighs what a latent distribution costs; leave it out, or set variational: true"
            )


def describe(options: Options, data: DataShape) -> ModelSize:
    """Parameters, floating point operations and activations of one sample.

    Raises `InputError` for other than images and tables.
    """
    _check(data)
    told = options.latent_size * (2 if options.variational else 1)
    if data.kind == "images":
        of = levels(data.height, data.width, options.width)
        size = encoder(of, data.channels, told, True) + decoder(of, options.latent_size, data.channels)
    else:
        size = _dense((data.num_features, *options.hidden, told))
        size += _dense((options.latent_size, *reversed(options.hidden), data.num_features))
    return ModelSize(
        num_parameters=size.parameters + int(options.variational),
        flops_per_sample=6 * size.products,
        activation_bytes_per_sample=4 * size.kept,
    )


def build(options: Options, data: DataShape, train: "Train") -> "Reconstruction":
    """The task of making samples again, with weights that are a function of `train.seed` alone."""
    import torch

    from dtrain.models.networks.autoencoder import Autoencoder
    from dtrain.models.networks.initial import on_cpu

    _check(data)
    with torch.device("meta"):
        network = Autoencoder(options, data)
    on_cpu(network)
    network.initialise(train.seed)
    return Reconstruction(options, data.kind == "images", network)


def _check(data: DataShape) -> None:
    if data.kind not in ("images", "table"):
        raise InputError(
            f"model autoencoder learns from images or a table, not from {data.kind}; use data: {{name: images}} or"
            " {name: table}"
        )


def _dense(sizes: tuple[int, ...]) -> Size:
    products = sum(before * after for before, after in itertools.pairwise(sizes))
    return Size(products + sum(sizes[1:]), products, sum(sizes))


class Reconstruction(Task):
    """One network, one phase: mean squared error, or variational the nats a number of a sample needs (minus the ELBO).

    The spread around what is made is learnt too, one for all numbers (Rybkin et al., "Simple and effective VAE
    training with calibrated decoders", 2021), so that no weight between the two costs has to be found.
    """

    shows_progress = True

    def __init__(self, options: Options, has_pictures: bool, network: "Autoencoder") -> None:
        super().__init__({"model": network})
        self._options, self._has_pictures, self._network = options, has_pictures, network

    def loss(self, phase: str, parts: "Mapping[str, nn.Module]", batch: "Mapping[str, torch.Tensor]") -> "torch.Tensor":
        """Mean cost of the samples of `batch`: of making them, and of telling them."""
        del phase
        _, making, telling = self._run(parts, batch)
        return (making + self._options.kl_weight * telling).mean()

    def evaluate(
        self, parts: "Mapping[str, nn.Module]", batch: "Mapping[str, torch.Tensor]"
    ) -> "dict[str, torch.Tensor]":
        """Both costs and squared errors of one held-out batch."""
        import torch

        made, making, telling = self._run(parts, batch)
        inputs = self._inputs(batch)
        return {
            "making": making.sum(),
            "telling": telling.sum(),
            "kl": telling.sum() * inputs[0].numel(),
            "squared_error": (made - inputs).square().flatten(1).mean(1).sum(),
            "samples": torch.tensor(len(inputs), device=inputs.device),
        }

    def finish_evaluation(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Means: the loss, the squared error of a number, and variational the nats of the latent numbers a sample."""
        num, error = sums["samples"], sums["squared_error"] / sums["samples"]
        if not self._options.variational:
            return {"loss": error, "squared_error": error}
        loss = (sums["making"] + self._options.kl_weight * sums["telling"]) / num
        return {"loss": loss, "squared_error": error, "kl": sums["kl"] / num}

    def blocks(self) -> "list[nn.Module]":
        """The stages of encoder and decoder."""
        return [*self._network.encoder.stages, *self._network.decoder.stages]

    def sample(self, source: Any, request: Request) -> Sample | None:
        """`count` new pictures; from a plain autoencoder held-out ones, each followed by what is made of it."""
        import numpy as np
        import torch

        if not self._has_pictures:
            return None
        network = self.parts["model"]
        device = next(network.parameters()).device
        with torch.no_grad():
            if self._options.variational:
                generator = torch.Generator().manual_seed(request.seed)
                latents = torch.randn(request.count, self._options.latent_size, generator=generator)
                made = torch.cat([network(None, latents=some.to(device)).float().cpu() for some in latents.split(256)])
                return Sample(pictures=source.to_pixels(made.numpy()))
            num = min(math.ceil(request.count / 2), source.held_out.num_samples)
            held_out = source.held_out.batch(np.arange(num), np.zeros(num, dtype=np.uint64))["images"]
            again = network(torch.from_numpy(held_out).to(device))[0].cpu().numpy()
            pairs = np.stack([held_out, again], axis=1).reshape(2 * num, *held_out.shape[1:])
            return Sample(pictures=source.to_pixels(pairs))

    def _run(
        self, parts: "Mapping[str, nn.Module]", batch: "Mapping[str, torch.Tensor]"
    ) -> "tuple[torch.Tensor, torch.Tensor, torch.Tensor]":
        from dtrain.models.networks.noise import normal

        noise = normal(batch["draws"], self._options.latent_size) if self._options.variational else None
        return parts["model"](self._inputs(batch), noise)

    def _inputs(self, batch: "Mapping[str, torch.Tensor]") -> "torch.Tensor":
        return batch["images"] if self._has_pictures else batch["features"]
