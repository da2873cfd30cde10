"""Normalization over the last dimension."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn


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


def lowered(x: torch.Tensor) -> torch.Tensor:
    """`x` in autocast's format, where autocast is on: cast once here, not once for each matrix that reads it."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
