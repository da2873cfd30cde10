"""A network whose forward pass is its own `loss` method: strategies see forward passes and nothing else."""

from collections.abc import Mapping

import torch
from torch import nn


class WithLoss(nn.Module):
    """Calls `network.loss(batch)`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        loss: torch.Tensor = self.network.loss(batch)
        return loss
