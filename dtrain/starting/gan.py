"""The task: a generator and a discriminator that learn from each other. Change the networks, the losses, or both."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dtrain
from dtrain.models.networks import noise


def build(data: dtrain.DataShape, train: Any, latent: int = 16, width: int = 128) -> dtrain.Task:
    """Called on every worker, torch's generator seeded; `options` in the job are its keyword arguments."""
    shape = (data.channels, data.height, data.width)
    size = shape[0] * shape[1] * shape[2]
    generator = nn.Sequential(
        nn.Linear(latent, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, size), nn.Tanh()
    )
    discriminator = nn.Sequential(
        nn.Flatten(),
        nn.utils.parametrizations.spectral_norm(nn.Linear(size, width)),
        nn.LeakyReLU(0.2),
        nn.utils.parametrizations.spectral_norm(nn.Linear(width, 1)),
    )
    return Drawing(generator, discriminator, latent, shape)


class Drawing(dtrain.Task):
    """Two networks and two updates a step: `parts` and `phases`."""

    def __init__(
        self, generator: nn.Module, discriminator: nn.Module, latent: int, shape: tuple[int, int, int]
    ) -> None:
        super().__init__(
            {"generator": generator, "discriminator": discriminator},
            [dtrain.Phase("discriminator", ("discriminator",)), dtrain.Phase("generator", ("generator",))],
        )
        self.latent, self.shape = latent, shape

    def loss(self, phase: str, parts: Mapping[str, nn.Module], batch: Mapping[str, Tensor]) -> Tensor:
        """The hinge loss of the discriminator, or what the generator makes of it."""
        # Noise comes from the samples' own draws: it is the same for any number of workers.
        drawn = parts["generator"](noise.normal(batch["draws"], self.latent))
        if phase == "generator":
            return -parts["discriminator"](drawn).mean()
        real, false = parts["discriminator"](batch["images"]), parts["discriminator"](drawn.detach())
        return F.relu(1 - real).mean() + F.relu(1 + false).mean()

    def sample(self, source: Any, request: dtrain.Request) -> dtrain.Sample:
        """New pictures: shown at the end of a run, and by `dtrain sample`."""
        numbers = torch.arange(request.count, device=next(self.parts["generator"].parameters()).device)
        code = noise.normal(numbers + request.seed * 1_000_003, self.latent)
        with torch.no_grad():
            pictures = self.parts["generator"](code).view(-1, *self.shape)
        pixels = ((pictures + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return dtrain.Sample(pictures=pixels.permute(0, 2, 3, 1).cpu().numpy())
