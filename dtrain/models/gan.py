"""Generative adversarial networks: one network makes pictures, another tells them from real ones."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta

from dtrain.data import DataShape
from dtrain.errors import InputError
from dtrain.models import ModelSize, Phase, Request, Sample, Task
from dtrain.models.pictures import decoder, encoder, levels
from dtrain.settings import Settings

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dtrain.models.networks.gan import Discriminator
    from dtrain.models.networks.pictures import Decoder
    from dtrain.spec.job import Train

NUM_MADE = 8
"""Pictures made for each held-out one, to measure how they are distributed."""
_DISCRIMINATOR, _GENERATOR, _HELD_OUT = 1, 2, 3


class Options(Settings):
    """DCGAN: a generator makes pictures, a discriminator tells them from real ones; each trains in its own phase."""

    latent_size: Annotated[int, Meta(gt=0, le=2**16)] = 128
    """Random numbers that a picture is made from."""
    generator_width: Annotated[int, Meta(gt=0, le=4096)] = 32
    """Channels of the generator at full size; they double with every halving, up to 16 times as many."""
    discriminator_width: Annotated[int, Meta(gt=0, le=4096)] = 32
    """The same of the discriminator."""
    loss: Literal["nonsaturating", "hinge"] = "nonsaturating"
    """Logistic losses (Goodfellow et al., 2014), or hinge losses (Miyato et al., 2018)."""
    discriminator_norm: Literal["spectral", "batchnorm", "none"] = "spectral"
    """`spectral` divides each weight by its largest singular value, which bounds the slopes of the discriminator;
    `batchnorm` is DCGAN's own."""
    output: Literal["linear", "tanh"] = "linear"
    """`tanh` keeps what is made between -1 and 1, for pictures with data.mean and data.std [0.5]."""
    discriminator_lr_share: Annotated[float, Meta(gt=0.0, le=100.0)] = 1.0
    """Learning rate of the discriminator, as a multiple of the optimizer's."""


def describe(options: Options, data: DataShape) -> ModelSize:
    """Parameters, floating point operations and activations of one sample, over both phases.

    A real picture passes the discriminator forward and backward, and so does a made one in its phase; in the
    generator's phase another does, without gradients of the discriminator's weights. Raises `InputError` for other
    than images.
    """
    _check(data)
    size = (data.height, data.width)
    made = decoder(levels(*size, options.generator_width), options.latent_size, data.channels)
    has_norm = options.discriminator_norm == "batchnorm"
    judged = encoder(levels(*size, options.discriminator_width), data.channels, 1, has_norm)
    return ModelSize(
        num_parameters=made.parameters + judged.parameters,
        flops_per_sample=2 * ((1 + 3) * made.products + (2 * 3 + 2) * judged.products),
        activation_bytes_per_sample=4 * max(2 * judged.kept, made.kept + judged.kept),
        parts=("generator", "discriminator"),
    )


def build(options: Options, data: DataShape, train: "Train") -> "GAN":
    """The task of making pictures, with weights that are a function of `train.seed` alone."""
    import torch

    from dtrain.models.networks.gan import Discriminator
    from dtrain.models.networks.initial import on_cpu
    from dtrain.models.networks.pictures import Decoder

    _check(data)
    of_generator, of_discriminator = (
        levels(data.height, data.width, width) for width in (options.generator_width, options.discriminator_width)
    )
    with torch.device("meta"):
        generator = Decoder(of_generator, options.latent_size, data.channels, options.output == "tanh")
        discriminator = Discriminator(of_discriminator, data.channels, options.discriminator_norm)
    on_cpu(generator).initialise(train.seed)
    on_cpu(discriminator).encoder.initialise(train.seed + 1)
    return GAN(options, generator, discriminator)


def _check(data: DataShape) -> None:
    if data.kind != "images":
        raise InputError(f"model gan learns from images, not from {data.kind}; use data: {{name: images}}")


class GAN(Task):
    """Two networks and two phases. Held-out metrics are both losses, and as `loss` the energy score.

    The losses of two players say how they fare against each other, not what the pictures are worth. The energy score
    compares made pictures with held-out ones, without either player: least when both are distributed alike.
    """

    shows_progress = True

    def __init__(self, options: Options, generator: "Decoder", discriminator: "Discriminator") -> None:
        super().__init__(
            {"generator": generator, "discriminator": discriminator},
            [Phase("discriminator", ("discriminator",)), Phase("generator", ("generator",))],
        )
        self._options, self._generator, self._discriminator = options, generator, discriminator

    def loss(self, phase: str, parts: "Mapping[str, nn.Module]", batch: "Mapping[str, torch.Tensor]") -> "torch.Tensor":
        """Mean cost of telling pictures of `batch` from made ones, or of made ones being told."""
        import torch

        from dtrain.models.networks import gan
        from dtrain.models.networks.noise import normal

        images, draws = batch["images"], batch["draws"]
        if phase == "discriminator":
            with torch.no_grad():
                made = parts["generator"](normal(draws, self._options.latent_size, stream=_DISCRIMINATOR))
            real, fake = parts["discriminator"](images, made.to(images.dtype))
            return gan.discriminator_nats(real, fake, self._options.loss).mean()
        made = parts["generator"](normal(draws, self._options.latent_size, stream=_GENERATOR))
        (fake,) = parts["discriminator"](made)
        return gan.generator_nats(fake, self._options.loss).mean()

    def evaluate(
        self, parts: "Mapping[str, nn.Module]", batch: "Mapping[str, torch.Tensor]"
    ) -> "dict[str, torch.Tensor]":
        """Energy scores, and both losses, of one held-out batch."""
        import torch

        from dtrain.models.networks import gan
        from dtrain.models.networks.noise import normal

        images = batch["images"]
        latents = normal(batch["draws"], NUM_MADE, self._options.latent_size, stream=_HELD_OUT)
        made = parts["generator"](latents.flatten(0, 1)).to(images.dtype).unflatten(0, (-1, NUM_MADE))
        real, fake = parts["discriminator"](images, made[:, 0])
        return {
            "energy": gan.energy_score(images, made).sum(),
            "discriminator": gan.discriminator_nats(real, fake, self._options.loss).sum(),
            "generator": gan.generator_nats(fake, self._options.loss).sum(),
            "samples": torch.tensor(len(images), device=images.device),
        }

    def finish_evaluation(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Means over the samples; `loss` is the energy score."""
        num = sums["samples"]
        return {
            "loss": sums["energy"] / num,
            "discriminator_loss": sums["discriminator"] / num,
            "generator_loss": sums["generator"] / num,
        }

    def blocks(self) -> "list[nn.Module]":
        """The stages of both networks."""
        return [*self._generator.stages, *self._discriminator.encoder.stages]

    def learning_rate_share(self, phase: Phase, name: str) -> float:
        """The discriminator may learn faster (Heusel et al., "Two time-scale update rule", 2017)."""
        return self._options.discriminator_lr_share if phase.name == "discriminator" else 1.0

    def sample(self, source: Any, request: Request) -> Sample:
        """`count` new pictures."""
        import torch

        latents = torch.randn(
            request.count, self._options.latent_size, generator=torch.Generator().manual_seed(request.seed)
        )
        generator = self.parts["generator"]
        device = next(generator.parameters()).device
        with torch.no_grad():
            made = torch.cat([generator(some.to(device)).float().cpu() for some in latents.split(256)])
        return Sample(pictures=source.to_pixels(made.numpy()))
