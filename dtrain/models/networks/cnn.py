"""The networks of `dtrain/models/cnn.py`.

Their weights stay in torch's usual order even where pictures are held channels last: convolutions turn them as they
read them, and every strategy can then cut them.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn

from dtrain.models.cnn import BOTTLENECKS, RESNETS, VGG16, VGG_GRID, VGG_HIDDEN
from dtrain.models.networks.initial import he

if TYPE_CHECKING:
    from dtrain.data import DataShape
    from dtrain.models.cnn import Options

LINEAR_STD = 0.01
"""Of linear layers at the start (Goyal et al., "Accurate, large minibatch SGD", 2017; the same in VGG)."""


class Convolution(nn.Module):
    """A convolution that keeps the size of a picture up to its stride, batch norm, and relu where it is asked for."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, relu: bool = True, bias: bool = False
    ) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=bias)
        self.norm = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True) if relu else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.norm(self.convolution(x)))


class ResidualBlock(nn.Module):
    """Convolutions whose result is added to what they read."""

    def __init__(self, inputs: int, width: int, stride: int, is_bottleneck: bool) -> None:
        super().__init__()
        outputs = width * (4 if is_bottleneck else 1)
        if is_bottleneck:
            # The stride is in the middle convolution, as in every later implementation ("v1.5").
            layers = [
                Convolution(inputs, width, 1),
                Convolution(width, width, 3, stride),
                Convolution(width, outputs, 1, relu=False),
            ]
        else:
            layers = [Convolution(inputs, width, 3, stride), Convolution(width, outputs, 3, relu=False)]
        self.layers = nn.ModuleList(layers)
        is_changed = stride > 1 or inputs != outputs
        self.shortcut = Convolution(inputs, outputs, 1, stride, relu=False) if is_changed else nn.Identity()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for layer in self.layers:
            y = layer(y)
        return self.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet (He et al., "Deep residual learning for image recognition", 2016)."""

    def __init__(self, options: "Options", data: "DataShape") -> None:
        super().__init__()
        self._options = options
        width = options.width
        if options.stem_for(data.height, data.width) == "imagenet":
            self.stem = nn.Sequential(Convolution(data.channels, width, 7, 2), nn.MaxPool2d(3, 2, 1))
        else:
            self.stem = nn.Sequential(Convolution(data.channels, width, 3))
        is_bottleneck = options.architecture in BOTTLENECKS
        blocks, channels = [], width
        for stage, num_blocks in enumerate(RESNETS[options.architecture]):
            for number in range(num_blocks):
                stride = 2 if stage and number == 0 else 1
                blocks.append(ResidualBlock(channels, width * 2**stage, stride, is_bottleneck))
                channels = width * 2**stage * (4 if is_bottleneck else 1)
        self.blocks = nn.ModuleList(blocks)
        self.dropout = nn.Dropout(options.dropout) if options.dropout else nn.Identity()
        self.head = nn.Linear(channels, data.num_classes)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Fill every parameter and buffer, from `seed` alone."""
        he(self, seed, linear_std=LINEAR_STD)
        if self._options.zero_init:
            for block in self.blocks:
                block.layers[-1].norm.weight.zero_()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """For `images` [b, channels, height, width]: a score for each class, [b, classes]."""
        channels_last = self._options.channels_last
        # Once more behind the stem: pictures of one channel have no order that convolutions could tell.
        x = arranged(self.stem(arranged(images, channels_last)), channels_last)
        for block in self.blocks:
            x = block(x)
        return self.head(self.dropout(x.mean((2, 3))))


class VGG(nn.Module):
    """VGG-16 with batch norm (Simonyan and Zisserman, "Very deep convolutional networks", 2015)."""

    def __init__(self, options: "Options", data: "DataShape") -> None:
        super().__init__()
        self._options = options
        stages, channels = [], data.channels
        for multiple, num_layers in VGG16:
            layers: list[nn.Module] = []
            for _ in range(num_layers):
                layers.append(Convolution(channels, options.width * multiple, 3, bias=True))
                channels = options.width * multiple
            layers.append(Halving())
            stages.append(nn.Sequential(*layers))
        self.blocks = nn.ModuleList(stages)
        dropout = nn.Dropout(options.dropout) if options.dropout else nn.Identity()
        self.is_wide = options.stem_for(data.height, data.width) == "imagenet"
        if self.is_wide:
            hidden = options.width * VGG_HIDDEN
            self.head = nn.Sequential(
                nn.Linear(channels * VGG_GRID**2, hidden), nn.ReLU(inplace=True), dropout,
                nn.Linear(hidden, hidden), nn.ReLU(inplace=True), dropout,
                nn.Linear(hidden, data.num_classes),
            )  # fmt: skip
        else:
            self.head = nn.Sequential(dropout, nn.Linear(channels, data.num_classes))

    def initialise(self, seed: int) -> None:
        """Fill every parameter and buffer, from `seed` alone."""
        he(self, seed, linear_std=LINEAR_STD)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """For `images` [b, channels, height, width]: a score for each class, [b, classes]."""
        x = images
        for block in self.blocks:
            x = block(arranged(x, self._options.channels_last))
        x = nn.functional.adaptive_avg_pool2d(x, VGG_GRID if self.is_wide else 1)
        return self.head(x.flatten(1))


class Halving(nn.Module):
    """The largest of every 2 x 2 pixels; a row or column of one pixel stays."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        window = [2 if n > 1 else 1 for n in x.shape[2:]]
        return nn.functional.max_pool2d(x, window, window) if max(window) > 1 else x


def arranged(images: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """The pictures in the order of memory that convolutions are to work in."""
    return images.contiguous(memory_format=torch.channels_last) if channels_last else images
