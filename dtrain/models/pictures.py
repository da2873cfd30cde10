"""Arithmetic of networks that make pictures and judge them, stage by stage; `gan` and `autoencoder` share it.

At level k a picture has been halved k times and has `width` x 2**k channels, up to a limit. The last level is the
smallest that is at least 4 pixels high and wide.
"""

from dataclasses import dataclass

SMALLEST = 4
MAX_MULTIPLE = 16
"""Channels of the deepest levels, as a multiple of `width`."""


@dataclass(frozen=True)
class Levels:
    """Sizes and channels from the full picture (level 0) down."""

    sizes: tuple[tuple[int, int], ...]
    channels: tuple[int, ...]

    @property
    def numbers(self) -> tuple[int, ...]:
        """Numbers of a feature map at each level."""
        return tuple(c * h * w for c, (h, w) in zip(self.channels, self.sizes, strict=True))


@dataclass(frozen=True)
class Size:
    """What a network adds up to, for one picture."""

    parameters: int
    products: int
    kept: int
    """Numbers held for the backward pass."""

    def __add__(self, other: "Size") -> "Size":
        return Size(self.parameters + other.parameters, self.products + other.products, self.kept + other.kept)


def levels(height: int, width: int, channels: int) -> Levels:
    """The levels of pictures of this size, with this many channels at level 0."""
    sizes = [(height, width)]
    while min(sizes[-1]) // 2 >= SMALLEST:
        sizes.append((sizes[-1][0] // 2, sizes[-1][1] // 2))
    return Levels(tuple(sizes), tuple(channels * min(2**k, MAX_MULTIPLE) for k in range(len(sizes))))


def decoder(of: Levels, latent_size: int, channels: int) -> Size:
    """Of a `dtrain.models.networks.pictures.Decoder`."""
    last = of.channels[-1]
    made = Size(latent_size * of.numbers[-1] + 2 * last, latent_size * of.numbers[-1], latent_size + of.numbers[-1] * 2)
    for k in range(len(of.sizes) - 1, 0, -1):
        taps = 16 * of.channels[k] * of.channels[k - 1]
        area = of.sizes[k][0] * of.sizes[k][1]
        made += Size(taps + 2 * of.channels[k - 1], taps * area, 2 * of.numbers[k - 1])
    taps, area = 9 * of.channels[0] * channels, of.sizes[0][0] * of.sizes[0][1]
    return made + Size(taps + channels, taps * area, channels * area)


def encoder(of: Levels, channels: int, num_outputs: int, has_norm: bool) -> Size:
    """Of a `dtrain.models.networks.pictures.Encoder`."""
    taps, area = 9 * channels * of.channels[0], of.sizes[0][0] * of.sizes[0][1]
    made = Size(taps + of.channels[0], taps * area, channels * area + of.numbers[0])
    for k in range(1, len(of.sizes)):
        taps = 16 * of.channels[k - 1] * of.channels[k]
        area = of.sizes[k][0] * of.sizes[k][1]
        extra = 2 * of.channels[k] if has_norm else of.channels[k]
        made += Size(taps + extra, taps * area, of.numbers[k] * (2 if has_norm else 1))
    last = of.numbers[-1]
    return made + Size((last + 1) * num_outputs, last * num_outputs, num_outputs)
