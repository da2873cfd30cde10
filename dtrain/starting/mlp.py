"""The task: tell digits apart with a multilayer perceptron. Change the network, the loss, or both."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dtrain


def build(data: dtrain.DataShape, train: Any, width: int = 128, dropout: float = 0.1) -> dtrain.Task:
    """Called on every worker, torch's generator seeded; `options` in the job are its keyword arguments."""
    network = nn.Sequential(
        nn.Flatten(),
        nn.Linear(data.channels * data.height * data.width, width),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, data.num_classes),
    )
    return Digits({"model": network})


class Digits(dtrain.Task):
    """What is trained: `parts` are the networks, to be called as they are given."""

    def loss(self, phase: str, parts: Mapping[str, nn.Module], batch: Mapping[str, Tensor]) -> Tensor:
        """The mean over the micro batch."""
        return F.cross_entropy(parts["model"](batch["images"]), batch["labels"])

    def evaluate(self, parts: Mapping[str, nn.Module], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sums over a held-out batch; they are added up over all batches and workers."""
        scores = parts["model"](batch["images"])
        return {
            "nats": F.cross_entropy(scores, batch["labels"], reduction="sum"),
            "right": (scores.argmax(1) == batch["labels"]).sum(),
            "samples": torch.tensor(float(len(scores))),
        }

    def finish_evaluation(self, sums: Mapping[str, float]) -> dict[str, float]:
        """From the sums to the metrics; `loss` must be among them."""
        return {"loss": sums["nats"] / sums["samples"], "accuracy": sums["right"] / sums["samples"]}
