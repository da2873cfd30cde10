"""Pictures that models make, as a grid in one PNG file."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

SMALLEST = 512
"""Pixels a grid is wide at least: digits of 8 x 8 pixels are to be seen."""
GAP = 1


def save(folder: Path, step: int, pictures: "np.ndarray") -> str:
    """Write `pictures` (uint8 [count, height, width, 1 or 3]) of `step`; returns the name of the file."""
    from PIL import Image

    folder.mkdir(exist_ok=True)
    sheet = grid(pictures)
    image = Image.fromarray(sheet if sheet.shape[2] == 3 else sheet[..., 0])
    factor = -(-SMALLEST // image.width)
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    path = folder / f"step-{step:08d}.png"
    image.save(path)
    return path.name


def grid(pictures: "np.ndarray") -> "np.ndarray":
    """One picture of all, as square as can be: uint8 [height, width, channels]."""
    import numpy as np

    count, height, width, channels = pictures.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    sheet = np.zeros((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, channels), dtype=np.uint8)
    for number, picture in enumerate(pictures):
        top, left = number // columns * (height + GAP), number % columns * (width + GAP)
        sheet[top : top + height, left : left + width] = picture
    return sheet
