"""Models that others have trained, from a folder or from the Hugging Face hub, and how they are trained on.

What is predicted follows from the data: tokens (the next one), masked tokens, or the classes of images.
"""

import fnmatch
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta
from msgspec.structs import replace

from dtrain.data import DataShape
from dtrain.errors import InputError
from dtrain.models import ModelSize, Phase, Request, Sample, Task
from dtrain.models.classifier import Classifier
from dtrain.settings import Says, Settings

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dtrain.models.networks.pretrained import Pretrained
    from dtrain.spec.job import Train

Pattern = Annotated[str, Meta(min_length=1, max_length=1024)]
HEADS = {
    "tokens": ("AutoModelForCausalLM", ("ForCausalLM", "LMHeadModel")),
    "masked": ("AutoModelForMaskedLM", ("ForMaskedLM",)),
    "images": ("AutoModelForImageClassification", ("ForImageClassification",)),
}
"""For each kind of data the class of `transformers` that learns from it, and how the names of such models end."""
TIED = ("lm_head.weight", "decoder.weight", "embed_out.weight")
BUFFERS = re.compile(r"(^|\.)(running_mean|running_var|num_batches_tracked|position_ids|inv_freq|masked_bias)$")
"""Tensors of a file that are no parameters."""
FILES = ["*.json", "*.safetensors"]


class Lora(Settings):
    """Low-rank adaptation (Hu et al., "LoRA", 2021): the weights stay, and small matrices beside them are trained.

    Checkpoints hold what is trained, and a digest of the files whose weights it belongs to.
    """

    rank: Annotated[int, Meta(gt=0, le=4096)] = 8
    """Numbers between the two small matrices."""
    alpha: Annotated[int, Meta(gt=0, le=65536)] = 16
    """What they add is multiplied by alpha / rank."""
    dropout: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    """Share of their inputs dropped while training."""
    targets: Annotated[tuple[Pattern, ...], Meta(min_length=1)] | Literal["all-linear"] = "all-linear"
    """Ends of the names of the layers that get them, e.g. [q_proj, v_proj]; `all-linear` is all but the head."""


class Options(Settings):
    """A model of the `transformers` library that others have trained, for text or images."""

    source: Annotated[str, Meta(min_length=1, max_length=4096), Says("a folder, or a name on the Hugging Face hub")]
    """Folder with config.json and *.safetensors, which needs no network; else a name on the hub, e.g. openai/gpt2."""
    revision: Annotated[str, Meta(min_length=1, max_length=256)] = "main"
    """Branch, tag or commit of a name on the hub; a commit stays what it is."""
    freeze: Literal["backbone"] | tuple[Pattern, ...] = ()
    """Parameters that are not trained: patterns of their names, e.g. ["*.wte.*", "*.h.0.*"], or `backbone` for all but
    the head."""
    layer_decay: Annotated[float, Meta(gt=0, le=1)] = 1.0
    """Share of the learning rate that each layer gets of the one above it; 1 is the same rate for all."""
    lora: Lora | None = None
    """Train small matrices beside the weights, and the head where it is new, instead of the weights."""
    label_smoothing: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.0
    """Share of a target that is spread evenly over all classes, or tokens, while training."""
    mixup: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0
    """Train on sums of two images, with shares drawn from Beta(a, a) for this a; 0 turns it off."""
    cutmix: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0
    """Train on images with a part of another one in them, its area drawn from Beta(a, a) for this a; 0 turns it off."""

    def __post_init__(self) -> None:
        if self.lora is not None and self.freeze:
            raise ValueError("lora trains none of the weights already; leave freeze out")


def resolve(options: Options, folder: Path) -> Options:
    """The same with the path of a folder taken from `folder`; a hub name stays as it is."""
    path = folder / Path(options.source).expanduser()
    if path.is_dir() or options.source.startswith((".", "~", "/")):
        return replace(options, source=str(path.absolute()))
    return options


def describe(options: Options, data: DataShape) -> ModelSize:
    """What config.json and the headers of the weights in a folder that is here tell; zeros for what only building can.

    The count is exact for a model that was saved with the head that the data needs. Operations are 6 a token for each
    parameter (fewer with frozen ones), plus attention's; activations those of a transformer layer, about 16 widths a
    token, and three times its logits. Raises `InputError` for data that such a model cannot learn from.
    """
    _check_kind(data)
    folder = Path(options.source)
    if not (folder / "config.json").is_file():
        return ModelSize(num_parameters=0, flops_per_sample=0, activation_bytes_per_sample=0)
    config = _config(folder)
    _check_data(config, folder, data)
    total, trained = _count(options, config, folder, data)
    width, layers, length = _dimensions(config, data)
    if not (width and layers and length):
        return ModelSize(trained, 0, 0, num_frozen=total - trained)
    logits = data.vocabulary_size if data.kind != "images" else 0
    return ModelSize(
        num_parameters=trained,
        flops_per_sample=length * (6 * total + 12 * layers * width * length),
        activation_bytes_per_sample=4 * length * (16 * layers * width + 3 * logits),
        num_frozen=total - trained,
    )


def build(options: Options, data: DataShape, train: "Train") -> Task:
    """The task, its weights those of the source; what is new (a head, LoRA) is a function of `train.seed` alone.

    Raises `InputError` when there is no such model, or it does not go with the data.
    """
    import torch

    from dtrain.models.networks.pretrained import Pretrained, adapt, digest, load

    _check_kind(data)
    folder = _folder(options)
    config = _config(folder)
    _check_data(config, folder, data)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(train.seed)
        network, new = load(folder, HEADS[data.kind][0], data.num_classes if data.kind == "images" else 0)
        if options.lora is not None:
            adapt(network, options.lora, new)
    if options.lora is None:
        _freeze(options, network)
    part = Pretrained(network, digest(folder) if options.lora is not None else None)
    if data.kind == "images":
        return ImageTask(part, options)
    return TextTask(part, options, data)


class _Layered(Task):
    """What both tasks share: blocks, rates that fall from layer to layer, and weights that need not be kept."""

    _part: "Pretrained"
    _layer_decay: float

    def is_kept(self, name: str) -> bool:
        """With LoRA the weights stay those of the files, and only what is beside them must survive."""
        return self._part.is_kept(name.removeprefix("model."))

    def blocks(self) -> "list[nn.Module]":
        """The repeated layers of the model."""
        return self._part.blocks()

    def learning_rate_share(self, phase: Phase, name: str) -> float:
        """`layer_decay` to the power of the layers above: 1 for the head (Howard and Ruder, "ULMFiT", 2018)."""
        return float(self._layer_decay ** self._part.layers_above(name.removeprefix("model.")))


class TextTask(_Layered):
    """Predict the next or the hidden tokens: mean cross-entropy of the targets; bits a byte where bytes are known."""

    def __init__(self, part: "Pretrained", options: Options, data: DataShape) -> None:
        super().__init__({"model": part})
        self._part, self._layer_decay, self._smoothing = part, options.layer_decay, options.label_smoothing
        self._kind, self._length = data.kind, data.sequence_length

    def loss(self, phase: str, parts: "Mapping[str, nn.Module]", batch: "Mapping[str, torch.Tensor]") -> "torch.Tensor":
        """Mean nats a target of `batch`: inputs and targets, both [b, t]."""
        del phase
        self._part.check_files()
        return self._nats(parts, batch, self._smoothing) / (batch["targets"] >= 0).sum()

    def evaluate(
        self, parts: "Mapping[str, nn.Module]", batch: "Mapping[str, torch.Tensor]"
    ) -> "dict[str, torch.Tensor]":
        """Nats, targets and, where the data knows them, bytes of text of one held-out batch."""
        sums = {"nats": self._nats(parts, batch, 0.0), "targets": (batch["targets"] >= 0).sum()}
        if "target_bytes" in batch:
            sums["bytes"] = batch["target_bytes"].sum()
        return sums

    def finish_evaluation(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Mean nats a target, perplexity, and bits a byte of text."""
        loss = sums["nats"] / sums["targets"]
        metrics = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        if sums.get("bytes"):
            metrics["bits_per_byte"] = sums["nats"] / math.log(2) / sums["bytes"]
        return metrics

    def sample(self, source: Any, request: Request) -> Sample | None:
        """The prompt and the text of up to `length` tokens after it; None for a model that fills gaps only."""
        if self._kind != "tokens":
            return None
        self._part.check_files()
        tokens = source.encode(request.prompt)
        made = self._part.generate(
            tokens or [source.separator],
            request.length,
            self._length,
            request.temperature,
            request.top_k,
            request.seed,
            source.separator,
        )
        return Sample(source.decode([*tokens, *made]))

    def _nats(
        self, parts: "Mapping[str, nn.Module]", batch: "Mapping[str, torch.Tensor]", smoothing: float
    ) -> "torch.Tensor":
        import torch.nn.functional as F  # noqa: N812

        is_causal = self._kind == "tokens"
        scores = parts["model"](batch["inputs"], documents=batch.get("documents"), is_causal=is_causal)
        return F.cross_entropy(
            scores.flatten(0, 1).float(),
            batch["targets"].flatten(),
            ignore_index=-1,
            reduction="sum",
            label_smoothing=smoothing,
        )


class ImageTask(_Layered, Classifier):
    """Tell the classes of images apart."""

    def __init__(self, part: "Pretrained", options: Options) -> None:
        Classifier.__init__(self, part, (), options.label_smoothing, options.mixup, options.cutmix)
        self._part, self._layer_decay = part, options.layer_decay

    def loss(self, phase: str, parts: "Mapping[str, nn.Module]", batch: "Mapping[str, torch.Tensor]") -> "torch.Tensor":
        """Mean nats a sample."""
        self._part.check_files()
        return Classifier.loss(self, phase, parts, batch)


def _check_kind(data: DataShape) -> None:
    if data.kind not in HEADS:
        raise InputError(
            f"model pretrained learns from tokens, masked tokens and images, not from {data.kind}; use data: {{name:"
            " text} or {name: images}, or model: ./task.py:build for a model of your own"
        )


def _folder(options: Options) -> Path:
    """Where the files of the model are on this machine; a name on the hub is downloaded once."""
    path = Path(options.source)
    if path.is_dir():
        return path
    if path.is_absolute():
        raise InputError(f"model.source: there is no folder {path} on this machine; correct the path, or put it there")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(options.source, revision=options.revision, allow_patterns=FILES))
    except Exception as error:  # of several libraries; all of them mean that it cannot be had
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"model.source: {options.source} (revision {options.revision}) is no folder here and cannot be had"
            f" from the Hugging Face hub ({cause}); correct the name, or download it where there is a network and give"
            " its folder"
        ) from None


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except OSError as error:
        raise InputError(
            f"model.source: {folder}/config.json cannot be read ({error.strerror}); give a folder that"
            " save_pretrained wrote"
        ) from None
    except ValueError:
        raise InputError(f"model.source: {folder}/config.json is not JSON; download the model again") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise InputError(f"model.source: {folder}/config.json names no model_type; give a folder of transformers")
    return config


def _check_data(config: Mapping[str, Any], folder: Path, data: DataShape) -> None:
    """Raises `InputError` when the numbers in the data do not mean what the model learnt that they mean."""
    if data.kind == "images":
        channels, size = config.get("num_channels"), config.get("image_size")
        if channels is not None and channels != data.channels:
            raise InputError(
                f"model.source looks at images of {channels} channels, and data has {data.channels}; set"
                f" data.channels: {channels}"
            )
        sizes = [size, size] if isinstance(size, int) else size
        if sizes is not None and "patch_size" in config and list(sizes) != [data.height, data.width]:
            raise InputError(
                f"model.source looks at images of {sizes[0]} x {sizes[1]} pixels, and data has {data.height} x"
                f" {data.width}; set data.size: {sizes[0]}"
            )
        return
    known = _tokenizer_size(folder)
    rows = _text(config).get("vocab_size")
    if data.vocabulary_size != (known or data.vocabulary_size) or data.vocabulary_size > (rows or data.vocabulary_size):
        file = folder / "tokenizer.json"
        raise InputError(
            f"model.source knows {known or rows} tokens, and data has {data.vocabulary_size}: they are not those that"
            f" the model learnt; set data.tokenizer: {{name: file, path: {file}, vocab_size: {known or rows}}}"
        )
    longest = _text(config).get("max_position_embeddings") or _text(config).get("n_positions")
    if longest is not None and data.sequence_length > longest:
        raise InputError(
            f"data.sequence_length {data.sequence_length} is more than the {longest} positions that model.source knows;"
            f" set it to {longest} at most"
        )


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that speaks of text; some models have one inside."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def _tokenizer_size(folder: Path) -> int:
    """Tokens that a model's own tokenizer.json knows; 0 when it has none."""
    from dtrain.data.tokens import size_of

    file = folder / "tokenizer.json"
    return size_of(file) if file.is_file() else 0


def _dimensions(config: Mapping[str, Any], data: DataShape) -> tuple[int, int, int]:
    """Width, layers, and tokens of a sample; zeros where the config says it in words of its own."""
    text = _text(config)
    width = text.get("hidden_size") or text.get("n_embd") or text.get("d_model")
    layers = text.get("num_hidden_layers") or text.get("n_layer") or text.get("num_layers")
    length = data.sequence_length
    if data.kind == "images":
        patch = config.get("patch_size")
        length = (data.height // patch) * (data.width // patch) + 1 if isinstance(patch, int) else 0
    return (int(width), int(layers), length) if isinstance(width, int) and isinstance(layers, int) else (0, 0, 0)


def _count(options: Options, config: Mapping[str, Any], folder: Path, data: DataShape) -> tuple[int, int]:
    """(all parameters, trained ones) of a folder whose model has the head that is needed; zeros for another."""
    architecture = str((config.get("architectures") or [""])[0])
    shapes = _shapes(folder)
    if not shapes or not architecture.endswith(HEADS[data.kind][1]):
        return 0, 0
    if data.kind == "images":
        old = len(config.get("id2label") or {}) or 2  # two are not written down
        if old != data.num_classes:
            if "classifier.weight" not in shapes:
                return 0, 0
            shapes = {n: [data.num_classes, *s[1:]] if n.startswith("classifier.") else s for n, s in shapes.items()}
    elif _text(config).get("tie_word_embeddings"):
        shapes = {name: shape for name, shape in shapes.items() if not name.endswith(TIED)}
    total = sum(math.prod(shape) for shape in shapes.values())
    if options.lora is not None:
        if options.lora.targets == "all-linear" or data.kind == "images":
            return 0, 0
        targets = tuple(f".{target}.weight" for target in options.lora.targets)
        added = sum(options.lora.rank * sum(s) for n, s in shapes.items() if f".{n}".endswith(targets))
        return total + added, added
    if options.freeze == "backbone":
        return 0, 0
    frozen = sum(math.prod(s) for n, s in shapes.items() if any(fnmatch.fnmatchcase(n, p) for p in options.freeze))
    return total, total - frozen


def _shapes(folder: Path) -> dict[str, list[int]]:
    """Shapes of the parameters in the headers of a folder's safetensors files; empty when it has none."""
    index, found = folder / "model.safetensors.index.json", {}
    names = ["model.safetensors"]
    try:
        if index.is_file():
            names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        for name in names:
            with (folder / name).open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            found.update({key: facts["shape"] for key, facts in header.items() if key != "__metadata__"})
    except (OSError, ValueError, KeyError):
        return {}
    return {
        name: shape
        for name, shape in found.items()
        if not BUFFERS.search(name) and not (name.endswith("attn.bias") and len(shape) == 4)
    }


def _freeze(options: Options, network: "nn.Module") -> None:
    """Take what `options` freeze out of training. Raises `InputError` for a pattern that matches nothing."""
    names = [name for name, _ in network.named_parameters()]
    if options.freeze == "backbone":
        backbone = getattr(network, "base_model", network)
        frozen = {id(parameter) for parameter in backbone.parameters()}
    else:
        frozen = {id(network.get_parameter(name)) for name in _matching(options.freeze, names)}
    for parameter in network.parameters():
        parameter.requires_grad_(id(parameter) not in frozen)
    if all(id(parameter) in frozen for parameter in network.parameters()):
        raise InputError(
            "model.freeze leaves nothing to train (the head of this model has no weights of its own); freeze less, or"
            " use model.lora"
        )


def _matching(patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    found: list[str] = []
    for pattern in patterns:
        matched = fnmatch.filter(names, pattern)
        if not matched:
            shown = ", ".join(names[:3])
            raise InputError(
                f"model.freeze: no parameter is called {pattern!r}; they are called {shown}, ... up to {names[-1]}"
            )
        found += matched
    return found
