"""The judging network of `dtrain/models/gan.py`, and what its losses are made of."""

from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from dtrain.models.networks.pictures import Encoder
from dtrain.models.pictures import Levels


class Discriminator(nn.Module):
    """Gives each picture a score: high for real ones."""

    def __init__(self, levels: Levels, channels: int, norm: Literal["spectral", "batchnorm", "none"]) -> None:
        super().__init__()
        self.encoder = Encoder(levels, channels, 1, norm)
        self._is_apart = norm == "batchnorm"

    def forward(self, *groups: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """For each group of pictures [b, channels, height, width] their scores [b].

        With batch norm each group has statistics of its own, as in DCGAN; else all go through together.
        """
        if self._is_apart:
            return tuple(self.encoder(group)[:, 0] for group in groups)
        scores = self.encoder(torch.cat(groups))[:, 0]
        return scores.split([len(group) for group in groups])


def discriminator_nats(real: torch.Tensor, fake: torch.Tensor, loss: str) -> torch.Tensor:
    """What scores of as many real and made pictures cost the discriminator, [b]."""
    real, fake = real.float(), fake.float()
    if loss == "hinge":
        return F.relu(1.0 - real) + F.relu(1.0 + fake)
    return F.softplus(-real) + F.softplus(fake)


def generator_nats(fake: torch.Tensor, loss: str) -> torch.Tensor:
    """What scores of made pictures cost the generator, [b]."""
    return -fake.float() if loss == "hinge" else F.softplus(-fake.float())


def energy_score(real: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
    """How badly `made` [b, m, ...] foretell `real` [b, ...]: the energy score, [b].

    Source: Gneiting and Raftery, "Strictly proper scoring rules, prediction, and estimation", 2007, section 4.3.
    E|y - x| - E|y - y'| / 2 with the distance of two pictures, the root of their mean squared difference. On average
    it is least when pictures are made as the real ones are distributed, and nowhere else.
    """
    real, made = real.flatten(1).float(), made.flatten(2).float()
    scale = real.shape[1] ** -0.5
    far = (made - real[:, None]).norm(dim=2).mean(1)
    among = torch.stack([F.pdist(one).mean() for one in made])
    return scale * (far - among / 2)
