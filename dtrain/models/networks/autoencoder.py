"""The networks of `dtrain/models/autoencoder.py`."""

import itertools
import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from dtrain.models.networks.initial import he
from dtrain.models.networks.pictures import Decoder, Encoder
from dtrain.models.pictures import levels

if TYPE_CHECKING:
    from dtrain.data import DataShape
    from dtrain.models.autoencoder import Options


class Dense(nn.Module):
    """Linear layers with relu between them; each but the last is a block."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Linear(before, after), nn.ReLU(inplace=True))
            for before, after in itertools.pairwise(sizes[:-1])
        )
        self.head = nn.Linear(*sizes[-2:])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for stage in self.stages:
            x = stage(x)
        return self.head(x)


class Autoencoder(nn.Module):
    """Tells a sample by a few latent numbers, and makes it again from them."""

    def __init__(self, options: "Options", data: "DataShape") -> None:
        super().__init__()
        size = options.latent_size
        self.is_variational = options.variational
        num_told = size * (2 if options.variational else 1)
        self.encoder: nn.Module
        self.decoder: nn.Module
        if data.kind == "images":
            of = levels(data.height, data.width, options.width)
            self.encoder = Encoder(of, data.channels, num_told, "batchnorm")
            self.decoder = Decoder(of, size, data.channels)
        else:
            self.encoder = Dense((data.num_features, *options.hidden, num_told))
            self.decoder = Dense((size, *reversed(options.hidden), data.num_features))
        # Of one number rather than none, so that strategies can cut it as they cut others.
        self.log_noise = nn.Parameter(torch.empty(1)) if options.variational else None

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Fill every parameter and buffer, from `seed` alone."""
        he(self, seed)
        if self.log_noise is not None:
            self.log_noise.zero_()

    def forward(
        self, inputs: torch.Tensor | None, noise: torch.Tensor | None = None, latents: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | torch.Tensor:
        """For `inputs` [b, ...]: what is made of them, and per sample two costs [b], both divided by its numbers.

        The first is that of making it: mean squared error, or variational the nats under a normal distribution around
        what is made. The second is that of telling it, variational: the nats of the latent distribution beyond the
        standard normal one; `noise` [b, latents] is what it is drawn with. With `latents` instead of inputs: what they
        stand for.
        """
        if inputs is None:
            return self.decoder(latents)
        told = self.encoder(inputs).float()
        size = math.prod(inputs.shape[1:])
        if not self.is_variational:
            made = self.decoder(told).float()
            return made, (made - inputs).square().flatten(1).mean(1), told.new_zeros(len(told))
        assert self.log_noise is not None and noise is not None
        mean, log_variance = told.chunk(2, dim=1)
        log_variance = log_variance.clamp(-20.0, 20.0)
        made = self.decoder(mean + noise * (0.5 * log_variance).exp()).float()
        error = (made - inputs).square().flatten(1).mean(1)
        log_noise = self.log_noise.float()
        nats = 0.5 * error * torch.exp(-2 * log_noise) + log_noise + 0.5 * math.log(2 * math.pi)
        beyond = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)
        return made, nats, beyond / size
