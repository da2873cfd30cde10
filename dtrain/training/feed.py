"""What the loop reads: micro batches of a worker's own samples, as tensors on its device."""

import numpy as np
import torch

from dtrain.data import Dataset
from dtrain.data.order import Order

Batch = dict[str, torch.Tensor]


class Feed:
    """Micro batches in the order of training."""

    def __init__(self, dataset: Dataset, order: Order, device: torch.device) -> None:
        self._dataset, self._order = dataset, order
        self._to_device = Mover(device)
        self._last: tuple[tuple[int, int], Batch] | None = None

    def micro_batch(self, step: int, number: int) -> Batch:
        """Micro batch `number` of `step`, with the draws of its samples; asked twice in a row, it is read once."""
        if self._last is not None and self._last[0] == (step, number):
            return self._last[1]
        indices, draws = self._order.micro_batch(step, number)
        batch = self._to_device(read(self._dataset, indices, draws))
        self._last = (step, number), batch
        return batch


def read(dataset: Dataset, indices: np.ndarray, draws: np.ndarray) -> dict[str, np.ndarray]:
    """A batch of `dataset` with the draws beside what it holds."""
    return {**dataset.batch(indices, draws), "draws": draws.astype(np.int64)}


class Mover:
    """Arrays to tensors on the device; on GPUs through pinned memory, so that the copy overlaps with computing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, arrays: dict[str, np.ndarray]) -> Batch:
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if self._device.type == "cpu":
            return tensors
        return {name: t.pin_memory().to(self._device, non_blocking=True) for name, t in tensors.items()}
