"""Networks of the `transformers` library: how they are loaded, called, and given LoRA matrices."""

import contextlib
import hashlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dtrain.errors import InputError
from dtrain.models.networks.generation import choose
from dtrain.models.networks.transformer import apart

if TYPE_CHECKING:
    from dtrain.models.pretrained import Lora


NUM_SAMPLED, SAMPLED_BYTES = 64, 64 * 2**10
"""Of each file of weights, how many pieces of how many bytes are read to know it again."""


class Pretrained(nn.Module):
    """A model of `transformers`, called with tokens (int64 [b, t]) or images ([b, c, h, w]); gives scores."""

    def __init__(self, network: nn.Module, source: bytes | None = None) -> None:
        """`source` is the digest of the files that frozen weights come from; it is kept in their stead."""
        super().__init__()
        self.network = network
        self._layers = _depths(network)
        self._source = source
        self._frozen = {f"network.{name}" for name, p in network.named_parameters() if not p.requires_grad}
        self._is_checked = source is None
        if source is not None:
            self.register_buffer("source", torch.tensor(list(source), dtype=torch.uint8))

    def forward(
        self, inputs: torch.Tensor, documents: torch.Tensor | None = None, is_causal: bool = True
    ) -> torch.Tensor:
        """Scores [b, t, vocabulary] of tokens, [b, classes] of images.

        With `documents` (int64 [b, t], the number of the document that a token belongs to) tokens see those of their
        own document only, and its positions begin anew.
        """
        if inputs.is_floating_point():
            return self.network(pixel_values=inputs).logits
        words: dict[str, Any] = {"use_cache": False} if is_causal else {}
        if documents is not None:
            words["position_ids"], words["attention_mask"] = apart(documents, is_causal)
        return self.network(input_ids=inputs, **words).logits

    def is_kept(self, name: str) -> bool:
        """Whether the tensor `name` is not to be had from the files."""
        return self._source is None or name not in self._frozen

    def check_files(self) -> None:
        """Raises `InputError` when a checkpoint was put back that belongs to weights of other files."""
        if self._is_checked:
            return
        self._is_checked = True
        if bytes(self.source.tolist()) != self._source:
            raise InputError(
                "model.source: its files are not those that the checkpoint was trained beside; put the old ones back,"
                " or submit a new run"
            )

    def blocks(self) -> list[nn.Module]:
        """The repeated layers: elements of the outermost lists of equal modules."""
        return [block for _, blocks in _lists(self.network) for block in blocks]

    def layers_above(self, name: str) -> int:
        """How many layers are above the parameter `name` of this module: 0 for the head, most for the embeddings."""
        return self._layers[name.removeprefix("network.")]

    def generate(
        self,
        prompt: list[int],
        length: int,
        window: int,
        temperature: float,
        top_k: int | None,
        seed: int,
        end: int,
    ) -> list[int]:
        """Up to `length` tokens after `prompt` (not empty), of which the last `window` are seen; stops before `end`.

        Reads the text anew for each token, through the module itself: every worker of a sharded model makes the same
        calls.
        """
        generator = torch.Generator().manual_seed(seed)  # on the CPU, so that all devices draw alike
        device = next(self.parameters()).device
        seen, made = list(prompt), []
        with torch.no_grad():
            for _ in range(length):
                scores = self(torch.tensor([seen[-window:]], device=device))[0, -1].float().cpu()
                token = choose(scores, temperature, top_k, generator)
                if token == end:
                    break
                made.append(token)
                seen.append(token)
        return made


def digest(folder: Path) -> bytes:
    """SHA-256 of the weights' names, shapes and sizes in a folder, and of a sample of their bytes.

    All bytes of a large model would take a minute to read; other weights differ nearly everywhere.
    """
    total = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        with path.open("rb") as file:
            total.update(size.to_bytes(8, "little"))
            total.update(file.read(int.from_bytes(file.read(8), "little")))
            for number in range(NUM_SAMPLED):
                file.seek(max(size - SAMPLED_BYTES, 0) * number // (NUM_SAMPLED - 1))
                total.update(file.read(SAMPLED_BYTES))
    return total.digest()


def load(folder: Path, head: str, num_classes: int) -> tuple[nn.Module, list[str]]:
    """The model in `folder` in fp32, with the head that the class `head` of transformers gives it.

    `num_classes` is the number of classes of an image classifier; 0 for other models. Returns the network and the
    names of parameters that are not in the files and were made anew. Raises `InputError` for a folder that holds no
    such model.
    """
    with _quiet():
        import transformers

        words: dict[str, Any] = {"local_files_only": True}
        try:
            if num_classes:
                config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
                labels = getattr(config, "id2label", None) or {}
                if len(labels) != num_classes:
                    config.num_labels = num_classes
                words |= {"config": config, "ignore_mismatched_sizes": True}
            network, facts = getattr(transformers, head).from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **words
            )
        except (OSError, ValueError, KeyError) as error:
            cause = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(
                f"model.source: {folder} cannot be loaded by transformers.{head} ({cause}); give a folder that"
                " save_pretrained wrote, with *.safetensors, of a model for this kind of data"
            ) from None
    mismatched = [key[0] if isinstance(key, tuple) else key for key in facts["mismatched_keys"]]
    known = {name for name, _ in network.named_parameters()}
    new = sorted({*facts["missing_keys"], *mismatched} & known)
    if not num_classes and new:
        raise InputError(
            f"model.source: {folder} lacks {', '.join(new[:3])}{' and more' if len(new) > 3 else ''}: it was not saved"
            " with the head that predicts tokens; give a model that was"
        )
    return network.train(), new


def adapt(network: nn.Module, lora: "Lora", new: list[str]) -> None:
    """Give `network` LoRA matrices, in place; nothing is trained but them and the parameters called `new`."""
    with _quiet():
        from peft import LoraConfig, inject_adapter_in_model

        targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
        if isinstance(targets, str):
            head = network.get_output_embeddings() if hasattr(network, "get_output_embeddings") else None
            named = {id(module): name for name, module in network.named_modules()}
            kept = {named[id(head)]} if head is not None else {name.rpartition(".")[0] for name in new}
            targets = [name for name, module in network.named_modules() if _is_linear(module) and name not in kept]
        config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets)
        try:
            inject_adapter_in_model(config, network)
        except ValueError:
            linear = sorted({n.rpartition(".")[2] for n, m in network.named_modules() if _is_linear(m)})
            raise InputError(
                f"model.lora.targets: this model has no layer called {', '.join(targets[:5])}; it has"
                f" {', '.join(linear)}"
            ) from None
    for name, parameter in network.named_parameters():
        parameter.requires_grad_("lora_" in name or name in new)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _lists(network: nn.Module, prefix: str = "") -> Iterator[tuple[str, list[nn.Module]]]:
    """The outermost lists of at least two modules of one class, each with its name."""
    for name, child in network.named_children():
        blocks = list(child) if isinstance(child, nn.ModuleList) else []
        if len(blocks) > 1 and len({type(block) for block in blocks}) == 1:
            yield f"{prefix}{name}", blocks
        else:
            yield from _lists(child, f"{prefix}{name}.")


def _depths(network: nn.Module) -> dict[str, int]:
    """Layers above each parameter. What is registered before the first layer is below all, what comes after above."""
    places = {}
    lists = [(name, len(blocks)) for name, blocks in _lists(network)]
    top = 1 + max((number for _, number in lists), default=0)
    has_begun = False
    for name, _ in network.named_parameters():
        found = next((prefix for prefix, _ in lists if name.startswith(f"{prefix}.")), None)
        if found is not None:
            has_begun = True
            places[name] = top - 1 - int(name[len(found) + 1 :].partition(".")[0])
        else:
            places[name] = 0 if has_begun else top
    return places


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What transformers and peft tell of themselves is not for a log of training; what matters is raised."""
    loggers = [logging.getLogger(name) for name in ("transformers", "peft", "accelerate", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from transformers.utils import logging as told

            told.disable_progress_bar()
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
