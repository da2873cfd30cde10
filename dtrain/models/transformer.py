"""The transformer family: what it is follows from the data.

Tokens make it a decoder that predicts the next one (GPT), hidden tokens an encoder that fills them in (BERT), pairs of
texts an encoder and a decoder that translate, pictures an encoder that tells them apart (ViT).
"""

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta

from dtrain.data import DataShape
from dtrain.errors import InputError
from dtrain.models import ModelSize, Task
from dtrain.models.classifier import Classifier, Regularisation
from dtrain.models.language import LanguageModel, MaskedLanguageModel, Translator
from dtrain.settings import PositiveFloat, PositiveInt, default

if TYPE_CHECKING:
    from dtrain.spec.job import Train

KINDS = {
    "tokens": "tokens",
    "masked": "hidden tokens",
    "pairs": "pairs of texts",
    "images": "images",
}
"""What it learns from, in a person's words."""
ONLY_FOR = {
    "tie_weights": ("tokens", "masked", "pairs"),
    "pad_vocabulary_to": ("tokens", "masked", "pairs"),
    "patch_size": ("images",),
    "pooling": ("images",),
    "mixup": ("images",),
    "cutmix": ("images",),
}
"""Options that mean nothing for other data."""


class Options(Regularisation):
    """A transformer: decoder, encoder, both, or for images, as the data asks for; the defaults are GPT-2's."""

    num_layers: Annotated[PositiveInt, Meta(le=1024)] = 12
    """Blocks, each of attention and an MLP; to translate, as many in the encoder as in the decoder."""
    num_heads: Annotated[PositiveInt, Meta(le=1024)] = 12
    """Attention heads of a block; must divide `width`."""
    width: Annotated[PositiveInt, Meta(le=2**17)] = 768
    """Numbers a position is described by, from block to block."""
    mlp_ratio: Annotated[float, Meta(gt=0, le=64.0)] = 4.0
    """Hidden width of an MLP, as a multiple of `width`."""
    activation: Literal["gelu", "relu2", "swiglu"] = "gelu"
    """Inside an MLP: gelu, squared relu, or silu gating a second matrix (then 8/3 is the usual `mlp_ratio`)."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalization before attention and MLP, and at the end."""
    positions: Literal["learned", "rope"] = "learned"
    """How the model knows positions: a learned vector for each, or rotation of queries and keys."""
    rope_base: PositiveFloat = 10000.0
    """Base of the wavelengths of `positions: rope`."""
    qk_norm: bool = False
    """Normalize queries and keys, which keeps large learning rates stable."""
    bias: bool = True
    """Add a bias in linear layers and layer norms."""
    tie_weights: bool = True
    """Use one matrix to read tokens in and to predict them (texts)."""
    dropout: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.0
    """Share of numbers dropped while training: of embeddings, of attention weights, and of what a block adds."""
    init_std: Annotated[float, Meta(gt=0, le=1.0)] = 0.02
    """Standard deviation of the weights at the start; those that add to the stream get it over sqrt(2 x layers)."""
    pad_vocabulary_to: Annotated[PositiveInt, Meta(le=4096)] = 64
    """The vocabulary is padded to a multiple of this, which is faster on GPUs; padding is never predicted (texts)."""
    patch_size: Annotated[PositiveInt, Meta(le=4096)] = 16
    """Pixels of height and width of the squares a picture is cut into; must divide its height and width (images)."""
    pooling: Literal["class_token", "mean"] = "class_token"
    """What the class of a picture is told by: a learned vector put before its squares, or the mean of all (images)."""
    cutmix: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0
    """Train on pictures with a rectangle of another in them, of a share drawn from Beta(a, a) for this a; 0 turns it
    off; with mixup too, a coin decides for each sample (images)."""

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            near = [h for h in range(1, self.width + 1) if self.width % h == 0]
            nearest = min(near, key=lambda h: abs(h - self.num_heads))
            raise ValueError(f"num_heads {self.num_heads} does not divide width {self.width}; nearest: {nearest}")
        if self.positions == "rope" and self.width // self.num_heads % 2:
            raise ValueError(
                f"rope needs an even head width, and width {self.width} / num_heads {self.num_heads} is "
                f"{self.width // self.num_heads}; choose another num_heads, or positions: learned"
            )

    @property
    def hidden(self) -> int:
        """Hidden width of an MLP."""
        return max(round(self.width * self.mlp_ratio), 1)

    def num_places(self, data: DataShape) -> int:
        """Positions that a sample has."""
        if data.kind != "images":
            return data.sequence_length
        squares = (data.height // self.patch_size) * (data.width // self.patch_size)
        return squares + int(self.pooling == "class_token")

    def padded(self, vocabulary_size: int) -> int:
        """Rows of the token matrix."""
        return math.ceil(vocabulary_size / self.pad_vocabulary_to) * self.pad_vocabulary_to


def describe(options: Options, data: DataShape) -> ModelSize:
    """Parameters, floating point operations and activations of one sample.

    Operations are 6 for each parameter and position it multiplies, plus 12 x layers x width x length for attention and
    position, as if it were not causal (Chowdhery et al., "PaLM", 2022, appendix B). Raises `InputError` for data it
    cannot learn from, and for options that mean nothing for this data.
    """
    _check(options, data)
    w, length = options.width, options.num_places(data)
    reads = data.kind == "pairs"
    stack, matrix = _stack_parameters(options, reads=reads), w * (w + int(options.bias))
    attending = 12 * options.num_layers * w * length
    positions = length * w if options.positions == "learned" else 0
    kept = options.num_layers * _kept_numbers(options, reads=reads) + 4 * w
    if data.kind == "images":
        patch = data.channels * options.patch_size**2
        embedding, head = w * (patch + int(options.bias)), data.num_classes * (w + int(options.bias))
        class_token = w if options.pooling == "class_token" else 0
        return ModelSize(
            num_parameters=embedding + class_token + positions + stack + head,
            flops_per_sample=6 * (length * embedding + head) + length * (6 * stack + attending),
            activation_bytes_per_sample=4 * (length * kept + data.channels * data.height * data.width),
        )
    vocabulary = options.padded(data.vocabulary_size) * w
    vocabularies = vocabulary * (1 if options.tie_weights else 2)
    num_parameters, flops = stack + positions + vocabularies, length * (6 * (stack + vocabulary) + attending)
    if data.kind == "masked":
        transform = matrix + _norm(options)
        num_targets = data.num_targets or length
        num_parameters += transform
        flops = length * (6 * stack + attending) + 6 * num_targets * (transform + vocabulary)
    if data.kind == "pairs":
        encoder = _stack_parameters(options)
        num_parameters += encoder + positions
        flops += length * (6 * encoder + 2 * attending)
        kept += options.num_layers * _kept_numbers(options) + 4 * w
    return ModelSize(
        num_parameters=num_parameters, flops_per_sample=flops, activation_bytes_per_sample=4 * length * kept
    )


def _norm(options: Options) -> int:
    return options.width * (1 + int(options.bias and options.norm == "layernorm"))


def _stack_parameters(options: Options, reads: bool = False) -> int:
    """Of all blocks and the last norm."""
    w, hidden, bias, norm = options.width, options.hidden, int(options.bias), _norm(options)
    attention = 4 * (w * w + bias * w) + (2 * (w // options.num_heads) if options.qk_norm else 0)
    num_up = 2 if options.activation == "swiglu" else 1
    mlp = num_up * (w * hidden + bias * hidden) + (hidden * w + bias * w)
    return options.num_layers * (attention + mlp + 2 * norm + int(reads) * (attention + norm)) + norm


def _kept_numbers(options: Options, reads: bool = False) -> int:
    """What a block keeps of a position for the backward pass."""
    # Both norms' inputs and outputs, q, k, v (rotated and normalized anew), mixed; reading has one norm, no rotation.
    kept = 8 + 2 * int(options.positions == "rope") + 2 * int(options.qk_norm)
    if reads:
        kept += 6 + 2 * int(options.qk_norm)
    num_up = 2 if options.activation == "swiglu" else 1
    return kept * options.width + (2 * num_up) * options.hidden


def build(options: Options, data: DataShape, train: "Train") -> Task:
    """The task that the data asks for, with weights that are a function of `train.seed` alone."""
    import torch

    from dtrain.models.networks.encoder_decoder import EncoderDecoder
    from dtrain.models.networks.initial import on_cpu
    from dtrain.models.networks.stack import TENSOR_PARALLEL
    from dtrain.models.networks.transformer import Encoder, Transformer
    from dtrain.models.networks.vision_transformer import VisionTransformer

    _check(options, data)
    network: Any
    with torch.device("meta"):
        if data.kind == "images":
            network = VisionTransformer(options, data)
        else:
            make = {"tokens": Transformer, "masked": Encoder, "pairs": EncoderDecoder}[data.kind]
            network = make(options, data.vocabulary_size, data.sequence_length)
    on_cpu(network)
    network.initialise(train.seed)
    stacks = [getattr(network, name) for name in ("encoder", "decoder") if hasattr(network, name)]
    blocks = [block for stack in stacks for block in stack.blocks]
    if data.kind == "images":
        return PictureTask(network, blocks, options.label_smoothing, options.mixup, options.cutmix)
    task = {"tokens": LanguageModel, "masked": MaskedLanguageModel, "pairs": Translator}[data.kind]
    return task(network, blocks, options.label_smoothing, TENSOR_PARALLEL)


class PictureTask(Classifier):
    """Tells pictures apart with a network whose blocks can be split over devices."""

    def tensor_parallel(self) -> dict[str, str]:
        """How blocks are split over devices."""
        from dtrain.models.networks.stack import TENSOR_PARALLEL

        return dict(TENSOR_PARALLEL)


def _check(options: Options, data: DataShape) -> None:
    if data.kind not in KINDS:
        raise InputError(
            f"model transformer learns from tokens, pairs of texts, or images, not from {data.kind}; use data:"
            " {name: text} or {name: images}"
        )
    for name, kinds in ONLY_FOR.items():
        if data.kind not in kinds and getattr(options, name) != default(Options, name):
            raise InputError(
                f"model.{name} is for {' or '.join(KINDS[kind] for kind in kinds)}, and the data holds"
                f" {KINDS[data.kind]}; leave it out"
            )
    if data.kind == "images":
        _check_pictures(options, data)


def _check_pictures(options: Options, data: DataShape) -> None:
    if data.num_classes == 0:
        raise InputError("model transformer needs a class for each of the images, and data.source has none; label them")
    if options.positions == "rope":
        raise InputError("model.positions: rope is for texts, and the data holds images; use positions: learned")
    size = options.patch_size
    if data.height % size or data.width % size:
        common = math.gcd(data.height, data.width)
        nearest = min((n for n in range(1, common + 1) if common % n == 0), key=lambda n: abs(n - size))
        raise InputError(
            f"model.patch_size {size} does not divide images of {data.height} x {data.width} pixels; nearest: {nearest}"
        )
