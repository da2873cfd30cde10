"""The vision transformer (Dosovitskiy et al., "An image is worth 16x16 words", 2021)."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from dtrain.models.networks import stack
from dtrain.models.networks.norm import lowered
from dtrain.models.networks.stack import Stack

if TYPE_CHECKING:
    from dtrain.data import DataShape
    from dtrain.models.transformer import Options


class Patches(nn.Module):
    """A picture as a text: a vector for each of its squares, row by row; before them a learned one, if asked for."""

    def __init__(self, options: "Options", channels: int) -> None:
        super().__init__()
        self.size = options.patch_size
        self.embedding = nn.Linear(channels * self.size**2, options.width, bias=options.bias)
        has_token = options.pooling == "class_token"
        self.class_token = nn.Parameter(torch.empty(1, options.width)) if has_token else None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[b, channels, height, width] to [b, t, w]."""
        squares = images.unfold(2, self.size, self.size).unfold(3, self.size, self.size)
        stream = self.embedding(squares.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2))
        if self.class_token is not None:
            stream = torch.cat([self.class_token.to(stream.dtype).expand(len(stream), 1, -1), stream], dim=1)
        return stream


class VisionTransformer(nn.Module):
    """Tells what is on a picture."""

    def __init__(self, options: "Options", data: "DataShape") -> None:
        super().__init__()
        self.options = options
        self.patches = Patches(options, data.channels)
        self.encoder = Stack(options, options.num_places(data), is_causal=False)
        self.head = nn.Linear(options.width, data.num_classes, bias=options.bias)

    def initialise(self, seed: int) -> None:
        """Fill every parameter and buffer, from `seed` alone."""
        stack.initialise(self, self.options, seed)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """For `images` [b, channels, height, width]: a score for each class, [b, classes]."""
        hidden = self.encoder(self.patches(images))
        hidden = hidden[:, 0] if self.patches.class_token is not None else hidden.mean(1)
        return self.head(lowered(hidden))
