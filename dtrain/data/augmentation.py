"""What is done to training pictures by chance: functions of the draws, over a whole batch at once."""

from typing import TYPE_CHECKING, Annotated

from msgspec import Meta

from dtrain.data.chance import uniform
from dtrain.settings import Settings

if TYPE_CHECKING:
    import numpy as np

_FLIP, _CROP, _PART = 1, 2, 3
_MAX_ASPECT = 4 / 3


class Augmentation(Settings):
    """What is done to training pictures by chance; nothing by default."""

    horizontal_flip: bool = False
    """Mirror half of the pictures, left to right."""
    crop_padding: Annotated[int, Meta(ge=0, le=512)] = 0
    """Pad pictures with this many black pixels on each side and crop them at a random place; 4 is usual for CIFAR."""
    resized_crop: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    """Crop a random part of at least this share of the area and scale it to `size`; 0.08 is usual for ImageNet."""


def flip_and_crop(pictures: "np.ndarray", options: Augmentation, draws: "np.ndarray") -> "np.ndarray":
    """Flipped and cropped pictures, uint8 [b, h, w, c] as given, for `draws` uint64 [b]."""
    import numpy as np

    pad = options.crop_padding
    if not (pad or options.horizontal_flip):
        return pictures
    _, height, width, _ = pictures.shape
    steps = np.where(options.horizontal_flip & (uniform(draws, 1, _FLIP)[:, 0] < 0.5), -1, 1).tolist()
    shifts = ((uniform(draws, 2, _CROP) * (2 * pad + 1)).astype(np.int64) - pad).tolist()
    made = np.zeros_like(pictures)
    # Slices copied one by one: several times quicker than gathering all pixels at once by their indices.
    for out, picture, step, (down, right) in zip(made, pictures, steps, shifts, strict=True):
        top, left = max(-down, 0), max(-right, 0)
        bottom, end = min(height, height - down), min(width, width - right)
        out[top:bottom, left:end] = picture[:, ::step][top + down : bottom + down, left + right : end + right]
    return made


def parts(smallest: float, sizes: "np.ndarray", draws: "np.ndarray") -> "np.ndarray":
    """Random parts of pictures of `sizes` (width, height: [b, 2]) as boxes (left, top, right, bottom): float64 [b, 4].

    Area from `smallest` to 1 of the picture's, width to height from 3/4 to 4/3 (Szegedy et al., "Going deeper with
    convolutions", 2014). A part that would stick out keeps its area, not its shape.
    """
    import numpy as np

    area, aspect, across, down = uniform(draws, 4, _PART).T
    area = (smallest + (1 - smallest) * area) * sizes.prod(axis=1)
    aspect = np.exp((2 * aspect - 1) * np.log(_MAX_ASPECT))
    width = np.minimum(np.sqrt(area * aspect), sizes[:, 0])
    height = np.minimum(area / width, sizes[:, 1])
    width = np.minimum(area / height, sizes[:, 0])
    left, top = across * (sizes[:, 0] - width), down * (sizes[:, 1] - height)
    return np.stack([left, top, left + width, top + height], axis=1)
