"""The task: a variational autoencoder that learns to draw digits. Change the networks, the loss, or both."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dtrain
from dtrain.models.networks import noise


def build(data: dtrain.DataShape, train: Any, latent: int = 8, width: int = 256) -> dtrain.Task:
    """Called on every worker, torch's generator seeded; `options` in the job are its keyword arguments."""
    return Drawing(Autoencoder((data.channels, data.height, data.width), latent, width))


class Autoencoder(nn.Module):
    """Encoder and decoder; the forward pass gives what both losses need."""

    def __init__(self, shape: tuple[int, int, int], latent: int, width: int) -> None:
        super().__init__()
        size = shape[0] * shape[1] * shape[2]
        self.shape, self.latent = shape, latent
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(size, width), nn.ReLU(), nn.Linear(width, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, width), nn.ReLU(), nn.Linear(width, size), nn.Tanh())

    def forward(self, images: Tensor, draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encoder(images).chunk(2, dim=1)
        # Noise comes from the samples' own draws: it is the same for any number of workers.
        code = mean + noise.normal(draws, self.latent) * (log_variance / 2).exp()
        return self.decoder(code).view(images.shape), mean, log_variance


class Drawing(dtrain.Task):
    """What is trained: `parts` are the networks, to be called as they are given."""

    def __init__(self, network: Autoencoder) -> None:
        super().__init__({"model": network})
        self.network = network

    def loss(self, phase: str, parts: Mapping[str, nn.Module], batch: Mapping[str, Tensor]) -> Tensor:
        """Squared error of the pictures and distance of the codes from a normal distribution, mean a sample."""
        drawn, mean, log_variance = parts["model"](batch["images"], batch["draws"])
        error = F.mse_loss(drawn, batch["images"], reduction="sum") * 4
        distance = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum()
        return (error + distance) / len(mean)

    def sample(self, source: Any, request: dtrain.Request) -> dtrain.Sample:
        """New pictures: shown at the end of a run, and by `dtrain sample`."""
        numbers = torch.arange(request.count, device=next(self.network.parameters()).device)
        code = noise.normal(numbers + request.seed * 1_000_003, self.network.latent)
        with torch.no_grad():
            pictures = self.network.decoder(code).view(-1, *self.network.shape)
        pixels = ((pictures + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return dtrain.Sample(pictures=pixels.permute(0, 2, 3, 1).cpu().numpy())
