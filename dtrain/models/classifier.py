"""Telling classes apart: the task that `mlp`, `cnn` and vision transformers share, and the options that go with it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

from msgspec import Meta

from dtrain.models import Task
from dtrain.settings import Settings

if TYPE_CHECKING:
    import torch
    from torch import nn


class Regularisation(Settings):
    """What keeps a classifier from being too sure of its training samples."""

    label_smoothing: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.0
    """Share of a label that is spread evenly over all classes while training."""
    mixup: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0
    """Train on sums of two samples, with shares drawn from Beta(a, a) for this a; 0 turns it off."""


class Classifier(Task):
    """One network that gives a score for each class, one phase, mean cross-entropy of the label.

    A batch holds `images` and `labels`, or `features` and `targets`; the network is called with the first of them and
    gives [b, classes]. Held-out metrics are the loss (without smoothing and mixing) and the accuracy.
    """

    def __init__(
        self,
        network: "nn.Module",
        blocks: "Sequence[nn.Module]" = (),
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
    ) -> None:
        super().__init__({"model": network})
        self._blocks = list(blocks)
        self._label_smoothing, self._mixup, self._cutmix = label_smoothing, mixup, cutmix

    def loss(self, phase: str, parts: "Mapping[str, nn.Module]", batch: "Mapping[str, torch.Tensor]") -> "torch.Tensor":
        """Mean nats a sample; of mixtures, the nats of both labels by their shares."""
        import torch.nn.functional as F  # noqa: N812

        from dtrain.models.networks import mixing

        inputs, labels = inputs_and_labels(batch)
        smoothing = self._label_smoothing
        if not (self._mixup or self._cutmix):
            return F.cross_entropy(parts["model"](inputs).float(), labels, label_smoothing=smoothing)
        mixed, share = mixing.mix(inputs, batch["draws"], self._mixup, self._cutmix)
        scores = parts["model"](mixed).float()
        own, partners = (
            F.cross_entropy(scores, known, label_smoothing=smoothing, reduction="none")
            for known in (labels, mixing.partners(labels))
        )
        return mixing.weighted(own, partners, share)

    def evaluate(
        self, parts: "Mapping[str, nn.Module]", batch: "Mapping[str, torch.Tensor]"
    ) -> "dict[str, torch.Tensor]":
        """Nats, correct answers and samples of one held-out batch."""
        import torch
        import torch.nn.functional as F  # noqa: N812

        inputs, labels = inputs_and_labels(batch)
        scores = parts["model"](inputs).float()
        return {
            "nats": F.cross_entropy(scores, labels, reduction="sum"),
            "correct": (scores.argmax(1) == labels).sum(),
            "samples": torch.tensor(len(labels), device=scores.device),
        }

    def finish_evaluation(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Mean nats a sample, and the share of right answers."""
        return {"loss": sums["nats"] / sums["samples"], "accuracy": sums["correct"] / sums["samples"]}

    def blocks(self) -> "list[nn.Module]":
        """The repeated blocks of the network."""
        return list(self._blocks)


def inputs_and_labels(batch: "Mapping[str, torch.Tensor]") -> "tuple[torch.Tensor, torch.Tensor]":
    """What is looked at and what is to be told of it, in a batch of `images` or of a `table`."""
    if "images" in batch:
        return batch["images"], batch["labels"]
    return batch["features"], batch["targets"]
