"""The data: 1,797 handwritten digits of 8 x 8 pixels, which come with scikit-learn. Put your own here."""

import numpy as np
from sklearn.datasets import load_digits  # type: ignore[import-untyped]


def open_data(held_out: float = 0.2) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Training and held-out samples: named arrays, or any dataset with len() and [index], torch's for example."""
    digits = load_digits()
    images = (digits.images[:, None] / 8 - 1).astype(np.float32)  # [n, channels, height, width], from -1 to 1
    labels = digits.target.astype(np.int64)
    every = round(1 / held_out)
    is_held_out = np.arange(len(labels)) % every == 0
    train, rest = ~is_held_out, is_held_out
    return {"images": images[train], "labels": labels[train]}, {"images": images[rest], "labels": labels[rest]}
