"""What models of language learn: the tasks that `transformer` and `rnn` share."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dtrain.models import Request, Sample, Task

if TYPE_CHECKING:
    import torch
    from torch import nn


class _TokenTask(Task):
    """One network, one phase; how its blocks are split over devices, and its label smoothing."""

    def __init__(
        self,
        network: "nn.Module",
        blocks: "Sequence[nn.Module]",
        label_smoothing: float = 0.0,
        tensor_parallel: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__({"model": network})
        self._network: Any = network
        self._blocks, self._label_smoothing = list(blocks), label_smoothing
        self._tensor_parallel = dict(tensor_parallel or {})

    def blocks(self) -> "list[nn.Module]":
        """The blocks."""
        return list(self._blocks)

    def tensor_parallel(self) -> dict[str, str]:
        """How blocks are split over devices."""
        return dict(self._tensor_parallel)

    def finish_evaluation(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Mean nats a target and perplexity; bits a byte of text and the share of right answers where counted."""
        loss = sums["nats"] / sums["targets"]
        metrics = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        if sums.get("bytes"):
            metrics["bits_per_byte"] = sums["nats"] / math.log(2) / sums["bytes"]
        if "correct" in sums:
            metrics["accuracy"] = sums["correct"] / sums["targets"]
        return metrics


class LanguageModel(_TokenTask):
    """Predicts the next token: mean cross-entropy over the targets."""

    def loss(self, phase: str, parts: "Mapping[str, nn.Module]", batch: "Mapping[str, torch.Tensor]") -> "torch.Tensor":
        """Mean nats a target of `batch`: inputs, targets, and perhaps documents, all [b, t]."""
        del phase
        targets = batch["targets"]
        nats = parts["model"](batch["inputs"], targets, batch.get("documents"), self._label_smoothing)
        return nats / (targets >= 0).sum()

    def evaluate(
        self, parts: "Mapping[str, nn.Module]", batch: "Mapping[str, torch.Tensor]"
    ) -> "dict[str, torch.Tensor]":
        """Nats, targets and, where the data knows them, bytes of text of one held-out batch."""
        targets = batch["targets"]
        nats = parts["model"](batch["inputs"], targets, batch.get("documents"))
        sums = {"nats": nats, "targets": (targets >= 0).sum()}
        if "target_bytes" in batch:
            sums["bytes"] = batch["target_bytes"].sum()
        return sums

    def sample(self, source: Any, request: Request) -> Sample:
        """The prompt and the text of up to `length` tokens after it; ends early where the model ends its document."""
        tokens = source.encode(request.prompt)
        made = self._network.generate(
            tokens or [source.separator], request.length, request.temperature, request.top_k, request.seed
        )
        return Sample(source.decode([*tokens, *_before(source.separator, made)]))


class MaskedLanguageModel(_TokenTask):
    """Fills in hidden tokens: mean cross-entropy over them, of which every sample has equally many."""

    def loss(self, phase: str, parts: "Mapping[str, nn.Module]", batch: "Mapping[str, torch.Tensor]") -> "torch.Tensor":
        """Mean nats a hidden token of `batch`: inputs, targets, perhaps documents, all [b, t], maybe places [b, n]."""
        del phase
        targets = batch["targets"]
        words = {"smoothing": self._label_smoothing, "hidden_places": batch.get("places")}
        nats = parts["model"](batch["inputs"], targets, batch.get("documents"), **words)
        return nats / (targets >= 0).sum()

    def evaluate(
        self, parts: "Mapping[str, nn.Module]", batch: "Mapping[str, torch.Tensor]"
    ) -> "dict[str, torch.Tensor]":
        """Nats, right answers and targets of one held-out batch."""
        import torch.nn.functional as F  # noqa: N812

        where, places = batch["targets"] >= 0, batch.get("places")
        targets = batch["targets"][where] if places is None else batch["targets"].gather(1, places).flatten()
        words = {"hidden_ones": where, "hidden_places": places}
        logits = parts["model"](batch["inputs"], None, batch.get("documents"), **words).float()
        return {
            "nats": F.cross_entropy(logits, targets, reduction="sum"),
            "correct": (logits.argmax(1) == targets).sum(),
            "targets": where.sum(),
        }

    def sample(self, source: Any, request: Request) -> Sample:
        """A held-out text, chosen by the seed, in which each hidden token is [as it was filled in], and after a bar as
        it was where that is another.
        """
        import numpy as np
        import torch

        index = np.array([request.seed % source.held_out.num_samples], dtype=np.int64)
        arrays = source.held_out.batch(index, np.zeros(1, dtype=np.uint64))
        device = self._network.tokens.weight.device
        batch = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
        where = batch["targets"] >= 0
        with torch.no_grad():
            logits = self._network(batch["inputs"], None, batch.get("documents"), hidden_ones=where)
        answers = iter(logits.argmax(1).tolist())
        text, seen = "", []
        for token, target in zip(arrays["inputs"][0].tolist(), arrays["targets"][0].tolist(), strict=True):
            if target < 0:
                seen.append(token)
                continue
            answer = next(answers)
            words = source.decode([answer]) + ("" if answer == target else "|" + source.decode([target]))
            text, seen = f"{text}{source.decode(seen)}[{words}]", []
        return Sample(text + source.decode(seen))


class Translator(_TokenTask):
    """Writes one text after another: cross-entropy of its tokens, a mean over them in each sample, then over samples.

    So the loss of a micro batch is a mean over samples, however their lengths differ.
    """

    def loss(self, phase: str, parts: "Mapping[str, nn.Module]", batch: "Mapping[str, torch.Tensor]") -> "torch.Tensor":
        """Mean over samples of their mean nats a target, of `batch`: source [b, s], inputs and targets [b, t]."""
        del phase
        targets = batch["targets"]
        counted = (targets >= 0).float()
        weights = counted / (counted.sum(dim=1, keepdim=True).clamp(min=1.0) * len(counted))
        return parts["model"](batch["source"], batch["inputs"], targets, self._label_smoothing, weights)

    def evaluate(
        self, parts: "Mapping[str, nn.Module]", batch: "Mapping[str, torch.Tensor]"
    ) -> "dict[str, torch.Tensor]":
        """Nats and targets of one held-out batch."""
        targets = batch["targets"]
        return {
            "nats": parts["model"](batch["source"], batch["inputs"], targets),
            "targets": (targets >= 0).sum(),
        }

    def sample(self, source: Any, request: Request) -> Sample:
        """The translation of the prompt, of up to `length` tokens."""
        made = self._network.generate(
            source.encode(request.prompt),
            source.separator,
            request.length,
            request.temperature,
            request.top_k,
            request.seed,
        )
        return Sample(source.decode(_before(source.separator, made)))


def _before(separator: int, tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(separator)] if separator in tokens else tokens
