"""Which samples are held out when the data does not say: by content, so that equal samples stand on one side."""

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dtrain.errors import InputError

if TYPE_CHECKING:
    import numpy as np

_SPREAD = 0x5EED


def hold_out(labels: "Sequence[int] | np.ndarray", contents: Sequence[str], fraction: float) -> "np.ndarray":
    """True for samples to hold out (bool [n]): about `fraction` of each label, chosen by the hashes `contents`.

    Does not depend on the order of the samples. Samples of equal contents are held out together, with the label that
    most of them have. Raises `InputError` when nothing, or everything, would be held out.
    """
    import numpy as np

    groups: dict[str, list[int]] = defaultdict(list)
    for number, content in enumerate(contents):
        groups[content].append(number)
    classes: dict[int, list[str]] = defaultdict(list)
    for content, numbers in groups.items():
        found = [int(labels[number]) for number in numbers]
        classes[max(sorted(set(found)), key=found.count)].append(content)
    held = np.zeros(len(contents), dtype=bool)
    for members in classes.values():
        total = sum(len(groups[content]) for content in members)
        target, done = round(total * fraction), 0
        for content in sorted(members):
            if done + len(groups[content]) <= target:
                held[groups[content]] = True
                done += len(groups[content])
    if not held.any() or held.all():
        raise InputError(
            f"data.held_out {fraction} of {len(contents)} samples leaves {int(held.sum())} held out and"
            f" {int((~held).sum())} to train on; give more samples or another share"
        )
    return held


def absent_from(contents: Sequence[str], others: Sequence[str]) -> "np.ndarray":
    """True for samples whose contents are not among `others`: bool [n]."""
    import numpy as np

    known = set(others)
    return np.array([content not in known for content in contents], dtype=bool)


def shuffled(num_samples: int) -> "np.ndarray":
    """Numbers below `num_samples` in a fixed order without pattern, so that the first few samples are a fair choice."""
    import numpy as np

    from dtrain.data.order import permute

    positions = np.arange(num_samples, dtype=np.int64)
    return permute(_SPREAD, np.zeros_like(positions), positions, num_samples) if num_samples else positions
