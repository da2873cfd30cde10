"""Convolutional networks that tell pictures apart: ResNet and VGG."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta

from dtrain.data import DataShape
from dtrain.errors import InputError
from dtrain.models import ModelSize
from dtrain.models.classifier import Classifier, Regularisation

if TYPE_CHECKING:
    from dtrain.spec.job import Train

RESNETS = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
}
"""Residual blocks of each stage (He et al., "Deep residual learning", 2016, table 1)."""
BOTTLENECKS = ("resnet50", "resnet101", "resnet152")
"""Those whose blocks have three convolutions, the middle one a quarter as wide as what goes in and out."""
VGG16 = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))
"""Width as a multiple of the first, and convolutions, of each stage (Simonyan and Zisserman, 2015, column D)."""
VGG_HIDDEN = 64
"""Size of VGG's wide layers, as a multiple of `width`."""
VGG_GRID = 7
"""VGG's wide layers read a grid of this many rows and columns."""
LARGE = 96
"""Pictures of this many pixels in height and width, and larger ones, get the stem for ImageNet."""


class Options(Regularisation):
    """A convolutional network for pictures; the defaults are ResNet-18's."""

    architecture: Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "vgg16"] = "resnet18"
    """ResNet by its number of layers, or VGG-16 with batch norm."""
    width: Annotated[int, Meta(gt=0, le=4096)] = 64
    """Channels of the first stage; later stages have multiples of it."""
    stem: Literal["cifar", "imagenet"] | None = None
    """`imagenet` shrinks a picture fourfold before the first stage (VGG: ends in two wide layers), `cifar` does not;
    chosen by the size of the pictures when left out: `imagenet` from 96 x 96 pixels on."""
    channels_last: bool = False
    """Keep the channels of a pixel together in memory, which is faster on GPUs in bf16 and on most CPUs."""
    zero_init: bool = True
    """Begin with residual blocks that change nothing: the scale of their last norm is zero; VGG has none."""
    dropout: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.0
    """Share of numbers dropped while training before the last layer, in VGG also between its wide layers."""
    cutmix: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0
    """Train on pictures with a rectangle of another in them, of a share drawn from Beta(a, a) for this a; 0 turns it
    off; with mixup too, a coin decides for each sample."""

    def stem_for(self, height: int, width: int) -> str:
        """The stem of pictures of this size."""
        return self.stem or ("imagenet" if min(height, width) >= LARGE else "cifar")


def describe(options: Options, data: DataShape) -> ModelSize:
    """Parameters, floating point operations and activations of one sample, followed layer by layer.

    Raises `InputError` for other than labelled images.
    """
    _check(data)
    stem = options.stem_for(data.height, data.width)
    walk = _Walk(data.channels, data.height, data.width)
    if options.architecture == "vgg16":
        _walk_vgg(walk, options, stem)
    else:
        _walk_resnet(walk, options, stem)
    walk.linear(data.num_classes)
    return ModelSize(
        num_parameters=walk.parameters,
        flops_per_sample=6 * walk.products,
        activation_bytes_per_sample=4 * (data.channels * data.height * data.width + walk.kept),
    )


def build(options: Options, data: DataShape, train: "Train") -> Classifier:
    """The task of telling pictures apart, with weights that are a function of `train.seed` alone."""
    import torch

    from dtrain.models.networks import cnn
    from dtrain.models.networks.initial import on_cpu

    _check(data)
    make = cnn.VGG if options.architecture == "vgg16" else cnn.ResNet
    with torch.device("meta"):
        network = make(options, data)
    on_cpu(network)
    network.initialise(train.seed)
    return Classifier(network, network.blocks, options.label_smoothing, options.mixup, options.cutmix)


def _check(data: DataShape) -> None:
    if data.kind != "images":
        raise InputError(f"model cnn learns from images, not from {data.kind}; use data: {{name: images}}")
    if data.num_classes == 0:
        raise InputError("model cnn needs a class for each of the images, and data.source has none; label them")


@dataclass
class _Walk:
    """What layers add up to, for a picture that goes through them."""

    channels: int
    height: int
    width: int
    parameters: int = 0
    products: int = 0
    kept: int = 0
    """Numbers that are held for the backward pass."""

    @property
    def numbers(self) -> int:
        return self.channels * self.height * self.width

    def convolve(
        self, channels: int, kernel: int, stride: int = 1, bias: bool = False, is_read_on: bool = True
    ) -> None:
        """A convolution and its norm: the norm keeps what it read, and what follows keeps what it made."""
        taps = self.channels * kernel * kernel
        self.shrink(stride)
        self.channels = channels
        self.parameters += channels * (taps + 2 + int(bias))
        self.products += self.numbers * taps
        self.kept += self.numbers * (2 if is_read_on else 1)

    def shrink(self, stride: int) -> None:
        self.height, self.width = (-(-n // stride) for n in (self.height, self.width))

    def linear(self, outputs: int) -> None:
        self.parameters += (self.numbers + 1) * outputs
        self.products += self.numbers * outputs
        self.kept += self.numbers
        self.channels, self.height, self.width = outputs, 1, 1


def _walk_resnet(walk: _Walk, options: Options, stem: str) -> None:
    if stem == "imagenet":
        walk.convolve(options.width, 7, 2)
        walk.shrink(2)
        walk.kept += 3 * walk.numbers  # the largest of each window, and which it was
    else:
        walk.convolve(options.width, 3)
    is_bottleneck = options.architecture in BOTTLENECKS
    for stage, num_blocks in enumerate(RESNETS[options.architecture]):
        width = options.width * 2**stage
        outputs = width * (4 if is_bottleneck else 1)
        for block in range(num_blocks):
            stride = 2 if stage and block == 0 else 1
            if stride > 1 or walk.channels != outputs:
                beside = _Walk(walk.channels, walk.height, walk.width)
                beside.convolve(outputs, 1, stride, is_read_on=False)
                walk.parameters += beside.parameters
                walk.products += beside.products
                walk.kept += beside.kept
            if is_bottleneck:
                walk.convolve(width, 1)
                walk.convolve(width, 3, stride)
                walk.convolve(outputs, 1)
            else:
                walk.convolve(width, 3, stride)
                walk.convolve(width, 3)
    walk.height = walk.width = 1


def _walk_vgg(walk: _Walk, options: Options, stem: str) -> None:
    for multiple, num_layers in VGG16:
        for _ in range(num_layers):
            walk.convolve(options.width * multiple, 3, bias=True)
        walk.height, walk.width = (max(n // 2, 1) for n in (walk.height, walk.width))
        walk.kept += 3 * walk.numbers
    if stem == "imagenet":
        walk.height = walk.width = VGG_GRID
        walk.linear(options.width * VGG_HIDDEN)
        walk.linear(options.width * VGG_HIDDEN)
    else:
        walk.height = walk.width = 1
