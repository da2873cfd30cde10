"""The decoder-only transformer of `dtrain/models/transformer.py`.

Shapes in comments: b samples, t positions, w width, h heads, d = w / h, v padded vocabulary. Queries, keys and values
are three matrices rather than one fused: splitting a model over devices by heads then cuts each of them in rows.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

if TYPE_CHECKING:
    from dtrain.models.transformer import Options

IGNORED = -1
"""A target with this value is not predicted."""
PLAIN_ATTENTION_LENGTH = 512
"""Longest text whose attention weights are held in memory, in bf16 on a CPU."""


def lowered(x: torch.Tensor) -> torch.Tensor:
    """`x` in autocast's format, where autocast is on: cast once here, not once for each matrix that reads it."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class Norm(nn.Module):
    """LayerNorm (Ba et al., 2016) or RMSNorm (Zhang and Sennrich, 2019) over the last dimension."""

    def __init__(self, kind: str, width: int, bias: bool) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if bias and kind == "layernorm" else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "rmsnorm":
            return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), 1e-6)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class KeyValues:
    """Keys and values of one layer, [b, h, t, d], for the tokens seen so far."""

    def __init__(self) -> None:
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None

    def extend(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.keys is not None and self.values is not None:
            keys, values = torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)
        self.keys, self.values = keys, values
        return keys, values


class Attention(nn.Module):
    """Causal self-attention over h heads."""

    def __init__(self, options: "Options") -> None:
        super().__init__()
        width = options.width
        self.num_heads = options.num_heads
        self.dropout = options.dropout
        self.query = nn.Linear(width, width, bias=options.bias)
        self.key = nn.Linear(width, width, bias=options.bias)
        self.value = nn.Linear(width, width, bias=options.bias)
        self.output = nn.Linear(width, width, bias=options.bias)
        self.query_norm = Norm("rmsnorm", width // options.num_heads, False) if options.qk_norm else None
        self.key_norm = Norm("rmsnorm", width // options.num_heads, False) if options.qk_norm else None

    def forward(
        self, x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor] | None, cache: KeyValues | None
    ) -> torch.Tensor:
        b, t, w = x.shape
        query, key, value = (
            projection(x).view(b, t, self.num_heads, w // self.num_heads).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if rotation is not None:
            query, key = rotate(query, *rotation), rotate(key, *rotation)
        if cache is not None:
            key, value = cache.extend(key, value)
        # With a filled cache there is one query, the newest, and it may see everything.
        mixed = attend(query, key, value, key.shape[2] == t, self.dropout if self.training else 0.0)
        return self.output(mixed.transpose(1, 2).reshape(b, t, w))


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool, dropout: float
) -> torch.Tensor:
    """Scaled dot-product attention of [b, h, t, d] tensors by torch's kernel, except in bf16 on a CPU.

    There torch's kernel takes three times as long as three plain products while t is short (measured with 4 heads of
    64 on AVX-512 bf16: 45 ms against 17 ms forward and backward for 16 x 256 tokens).
    """
    b, h, t, d = query.shape
    if query.device.type != "cpu" or query.dtype != torch.bfloat16 or t > PLAIN_ATTENTION_LENGTH or not is_causal:
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=is_causal)
    future = torch.full((t, t), -math.inf, dtype=query.dtype).triu(1)
    query, key, value = (x.reshape(b * h, t, d) for x in (query, key, value))
    scores = torch.baddbmm(future.expand(b * h, t, t), query, key.transpose(1, 2), alpha=d**-0.5)
    weights = F.dropout(F.softmax(scores, dim=-1), dropout) if dropout else F.softmax(scores, dim=-1)
    return (weights @ value).view(b, h, t, d)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (Su et al., "RoFormer", 2021) of x [b, h, t, d]; cos and sin are [t, d / 2].

    Pairs are (i, i + d / 2), as in GPT-NeoX and Llama.
    """
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class MLP(nn.Module):
    """The part of a block that looks at one position at a time."""

    def __init__(self, options: "Options") -> None:
        super().__init__()
        hidden = options.hidden
        self.activation = options.activation
        self.up = nn.Linear(options.width, hidden, bias=options.bias)
        self.gate = nn.Linear(options.width, hidden, bias=options.bias) if options.activation == "swiglu" else None
        self.down = nn.Linear(hidden, options.width, bias=options.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(x)
        if self.gate is not None:
            y = F.silu(self.gate(x)) * y
        elif self.activation == "relu2":
            y = F.relu(y).square()
        else:
            y = F.gelu(y, approximate="tanh")
        return self.down(y)


class Block(nn.Module):
    """One layer: attention, then MLP, each added to the stream it read through a norm."""

    def __init__(self, options: "Options") -> None:
        super().__init__()
        self.attention_norm = Norm(options.norm, options.width, options.bias)
        self.attention = Attention(options)
        self.mlp_norm = Norm(options.norm, options.width, options.bias)
        self.mlp = MLP(options)
        self.dropout = nn.Dropout(options.dropout) if options.dropout else nn.Identity()

    def forward(
        self,
        x: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor] | None = None,
        cache: KeyValues | None = None,
    ) -> torch.Tensor:
        x = x + self.dropout(self.attention(lowered(self.attention_norm(x)), rotation, cache))
        return x + self.dropout(self.mlp(lowered(self.mlp_norm(x))))


class Transformer(nn.Module):
    """A decoder-only transformer language model (Radford et al., "GPT-2", 2019; pre-norm)."""

    def __init__(self, options: "Options", vocabulary_size: int, sequence_length: int) -> None:
        super().__init__()
        self.options = options
        self.vocabulary_size = vocabulary_size
        self.sequence_length = sequence_length
        padded = options.padded(vocabulary_size)
        self.tokens = nn.Embedding(padded, options.width)
        self.positions = nn.Embedding(sequence_length, options.width) if options.positions == "learned" else None
        self.blocks = nn.ModuleList(Block(options) for _ in range(options.num_layers))
        self.final_norm = Norm(options.norm, options.width, options.bias)
        self.head = nn.Linear(options.width, padded, bias=False)
        if options.tie_weights:
            self.head.weight = self.tokens.weight
        if options.positions == "rope":
            half = options.width // options.num_heads // 2
            self.register_buffer("cos", torch.empty(sequence_length, half), persistent=False)
            self.register_buffer("sin", torch.empty(sequence_length, half), persistent=False)
        self.dropout = nn.Dropout(options.dropout) if options.dropout else nn.Identity()

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Fill every parameter and buffer, from `seed` alone.

        GPT-2's rule: normal with standard deviation `init_std`, divided by sqrt(2 x layers) where a layer adds to the
        stream, zero for biases, one for norms.
        """
        generator = torch.Generator().manual_seed(seed)
        std = self.options.init_std
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            elif name.endswith(("attention.output.weight", "mlp.down.weight")):
                parameter.normal_(0.0, std / math.sqrt(2 * self.options.num_layers), generator=generator)
            else:
                parameter.normal_(0.0, std, generator=generator)
        if self.options.positions == "rope":
            half = self.options.width // self.options.num_heads // 2
            frequency = self.options.rope_base ** (-torch.arange(half, dtype=torch.float64) / half)
            angle = torch.arange(self.sequence_length, dtype=torch.float64)[:, None] * frequency
            self.cos.copy_(angle.cos())
            self.sin.copy_(angle.sin())

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """For `inputs` [b, t]: the logits [b, t, vocabulary], or with `targets` [b, t] the sum of cross-entropies.

        The sum is in nats over the targets that are not `IGNORED`: a scalar in fp32.
        """
        hidden = self.final_norm(self._stream(inputs, 0, None))
        if targets is None:
            return self._logits(hidden)
        return linear_cross_entropy(hidden.flatten(0, 1), self.head.weight, targets.flatten(), self.vocabulary_size)

    def _stream(self, inputs: torch.Tensor, start: int, caches: list[KeyValues] | None) -> torch.Tensor:
        stop = start + inputs.shape[1]
        x = self.tokens(inputs)
        if self.positions is not None:
            x = x + self.positions.weight[start:stop]
        rotation = (self.cos[start:stop], self.sin[start:stop]) if self.options.positions == "rope" else None
        x = self.dropout(x)
        for number, block in enumerate(self.blocks):
            x = block(x, rotation, caches[number] if caches else None)
        return x

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head(hidden)[..., : self.vocabulary_size]

    @torch.no_grad()
    def generate(
        self,
        prompt: list[int],
        length: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 0,
        cached: bool = True,
    ) -> list[int]:
        """`length` tokens that follow `prompt` (not empty); temperature 0 takes the likeliest each time.

        The model sees at most `sequence_length` tokens: when they are full, the older half is dropped. `cached=False`
        reads the whole text again for each token and gives the same answer, slowly.
        """
        was_training = self.training
        self.eval()
        device = self.tokens.weight.device
        generator = torch.Generator().manual_seed(seed)  # on the CPU, so that all devices draw alike
        seen = prompt[-self.sequence_length :]
        caches: list[KeyValues] | None = None
        made: list[int] = []
        for _ in range(length):
            if len(seen) > self.sequence_length:
                seen = seen[-(self.sequence_length // 2 + 1) :]
                caches = None
            if caches is None or not cached:
                caches, new, start = [KeyValues() for _ in self.blocks], seen, 0
            else:
                new, start = seen[-1:], len(seen) - 1
            stream = self._stream(torch.tensor([new], device=device), start, caches)
            logits = self._logits(self.final_norm(stream[:, -1]))[0].float().cpu()
            made.append(choose(logits, temperature, top_k, generator))
            seen = [*seen, made[-1]]
        self.train(was_training)
        return made


def choose(logits: torch.Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    """One token from `logits` [vocabulary]: softmax at `temperature`, among the `top_k` likeliest."""
    if temperature <= 0:
        return int(logits.argmax())
    if top_k is not None and top_k < logits.shape[-1]:
        least = torch.topk(logits, top_k).values[-1]
        logits = logits.masked_fill(logits < least, -math.inf)
    return int(torch.multinomial(F.softmax(logits / temperature, dim=-1), 1, generator=generator))


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, vocabulary_size: int
) -> torch.Tensor:
    """Sum of cross-entropies in nats of softmax(hidden @ weight.T) against `targets`, without keeping the logits.

    hidden [n, w], weight [v, w] of which the first `vocabulary_size` rows count, targets [n] (`IGNORED` ones add
    nothing). Gradients are made chunk by chunk in the forward pass (the idea of Hsu et al., "Liger Kernel", 2024), so
    that memory does not grow with n x v; logits are in autocast's format, the softmax in fp32.
    """
    return _LinearCrossEntropy.apply(hidden, weight, targets, vocabulary_size)


class _LinearCrossEntropy(torch.autograd.Function):
    # Logits of a chunk: about what the caches of a core hold, and half a gigabyte on a GPU.
    CPU_CHUNK, GPU_CHUNK = 2**20, 2**28

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, vocabulary_size: int
    ) -> torch.Tensor:
        n, v = hidden.shape[0], weight.shape[0]
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        low_hidden, low_weight = lowered(hidden), lowered(weight)
        chunk = _LinearCrossEntropy.CPU_CHUNK if hidden.device.type == "cpu" else _LinearCrossEntropy.GPU_CHUNK
        rows = max(min(chunk // v, n), 1)
        nats = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(low_hidden) if want_hidden else None
        grad_weight = torch.zeros_like(low_weight, dtype=torch.float32) if want_weight else None
        for start in range(0, n, rows):
            part = slice(start, start + rows)
            counted = targets[part] != IGNORED
            index = targets[part].clamp(min=0)[:, None]
            logits = F.linear(low_hidden[part], low_weight).float()
            if vocabulary_size < v:
                logits[:, vocabulary_size:] = -math.inf
            log_total = logits.logsumexp(dim=1)
            nats += ((log_total - logits.gather(1, index).squeeze(1)) * counted).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            slope = logits.sub_(log_total[:, None]).exp_()
            slope.scatter_add_(1, index, torch.full_like(index, -1, dtype=slope.dtype))
            slope *= counted[:, None]
            slope = slope.to(low_weight.dtype)
            if grad_hidden is not None:
                torch.mm(slope, low_weight, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight += slope.t() @ low_hidden[part]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return nats

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        grads = [
            None if grad is None else (grad * slope).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return grads[0], grads[1], None, None
