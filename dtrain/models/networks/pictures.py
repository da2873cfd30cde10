"""Networks that make pictures from a few numbers and tell a few numbers from pictures, for `gan` and `autoencoder`.

Stages halve or double a picture by convolutions of 4 x 4, as in DCGAN (Radford et al., "Unsupervised representation
learning with deep convolutional GANs", 2016); `dtrain/models/pictures.py` says of what sizes.
"""

from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from dtrain.models.networks.initial import he
from dtrain.models.pictures import Levels

SLOPE = 0.2
"""Of a leaky relu below zero, as in DCGAN."""
SQUARINGS = 6
"""Squaring a matrix this often does as 64 steps of power iteration do."""


class Decoder(nn.Module):
    """From latent numbers to a picture."""

    def __init__(self, levels: Levels, latent_size: int, channels: int, has_tanh: bool = False) -> None:
        super().__init__()
        self._first = (levels.channels[-1], *levels.sizes[-1])
        self.first = nn.Linear(latent_size, levels.numbers[-1], bias=False)
        self.norm = nn.BatchNorm2d(levels.channels[-1])
        self.stages = nn.ModuleList(
            Doubling(levels.channels[k], levels.channels[k - 1], levels.sizes[k - 1])
            for k in range(len(levels.sizes) - 1, 0, -1)
        )
        self.last = nn.Conv2d(levels.channels[0], channels, 3, padding=1)
        self.has_tanh = has_tanh

    def initialise(self, seed: int) -> None:
        """Fill every parameter and buffer, from `seed` alone."""
        he(self, seed)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """For `latents` [b, latent_size]: pictures [b, channels, height, width]."""
        x = F.relu(self.norm(self.first(latents).unflatten(1, self._first)))
        for stage in self.stages:
            x = stage(x)
        x = self.last(x)
        return torch.tanh(x) if self.has_tanh else x


class Doubling(nn.Module):
    """A transposed convolution to a picture of `size`, twice as high and wide, batch norm and relu."""

    def __init__(self, inputs: int, outputs: int, size: tuple[int, int]) -> None:
        super().__init__()
        odd = (size[0] % 2, size[1] % 2)
        self.convolution = nn.ConvTranspose2d(inputs, outputs, 4, 2, 1, output_padding=odd, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.norm(self.convolution(x)))


class Encoder(nn.Module):
    """From a picture to `num_outputs` numbers: a score, or what is to be known of it."""

    def __init__(
        self, levels: Levels, channels: int, num_outputs: int, norm: Literal["spectral", "batchnorm", "none"]
    ) -> None:
        super().__init__()
        is_spectral = norm == "spectral"
        convolution, linear = (SpectralConv2d, SpectralLinear) if is_spectral else (nn.Conv2d, nn.Linear)
        self.first = convolution(channels, levels.channels[0], 3, padding=1)
        self.stages = nn.ModuleList(
            Halving(before, after, convolution, norm == "batchnorm")
            for before, after in zip(levels.channels[:-1], levels.channels[1:], strict=True)
        )
        self.head = linear(levels.numbers[-1], num_outputs)

    def initialise(self, seed: int) -> None:
        """Fill every parameter and buffer, from `seed` alone."""
        he(self, seed)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """For `pictures` [b, channels, height, width]: [b, num_outputs]."""
        x = F.leaky_relu(self.first(pictures), SLOPE, inplace=True)
        for stage in self.stages:
            x = stage(x)
        return self.head(x.flatten(1))


class Halving(nn.Module):
    """A convolution to a picture half as high and wide, batch norm where it is asked for, and leaky relu."""

    def __init__(self, inputs: int, outputs: int, convolution: type[nn.Conv2d], has_norm: bool) -> None:
        super().__init__()
        self.convolution = convolution(inputs, outputs, 4, 2, 1, bias=not has_norm)
        self.norm = nn.BatchNorm2d(outputs) if has_norm else nn.Identity()
        self.relu = nn.LeakyReLU(SLOPE, inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.norm(self.convolution(x)))


class SpectralConv2d(nn.Conv2d):
    """A convolution whose weight is divided by its largest singular value when it is used."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.weight / largest_singular_value(self.weight).to(self.weight.dtype), self.bias)


class SpectralLinear(nn.Linear):
    """A linear layer whose weight is divided by its largest singular value when it is used."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight / largest_singular_value(self.weight).to(self.weight.dtype), self.bias)


def largest_singular_value(weight: torch.Tensor) -> torch.Tensor:
    """The spectral norm of `weight` [n, ...] as a matrix of n rows: a scalar in fp32, from the weight alone.

    Spectral normalisation (Miyato et al., 2018) follows the singular vectors in a buffer, one step of power iteration
    a forward pass. Here they are found anew by squaring the Gram matrix: nothing to keep, to average or to restore,
    and recomputed activations are those of the first time. The gradient is that of their fixed singular vectors.
    """
    with torch.autocast(weight.device.type, enabled=False):
        matrix = weight.flatten(1).float()
        with torch.no_grad():
            power = matrix @ matrix.t() if matrix.shape[0] <= matrix.shape[1] else matrix.t() @ matrix
            for _ in range(SQUARINGS):
                power = power / power.diagonal().sum().clamp(min=1e-30)
                power = power @ power
            # Close to c u u': its row with the largest diagonal is the first singular vector u, up to its length.
            row = power.index_select(0, power.diagonal().argmax().view(1))[0]
            one = F.normalize(row, dim=0, eps=1e-30)
            if matrix.shape[0] <= matrix.shape[1]:
                left, right = one, F.normalize(matrix.t() @ one, dim=0, eps=1e-30)
            else:
                left, right = F.normalize(matrix @ one, dim=0, eps=1e-30), one
        return left @ (matrix @ right)
