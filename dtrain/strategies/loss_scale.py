"""Loss scaling for fp16, whose smallest numbers are larger than many gradients.

Source: Micikevicius et al., "Mixed precision training", 2018; the constants are those of `torch.amp.GradScaler`.
Whether a step is taken is decided by the norm of all gradients, which every worker knows alike, so all skip the same
steps.
"""

import torch

from dtrain.checkpoint.pieces import Piece, whole

START, GROWTH, BACKOFF, INTERVAL = 65536.0, 2.0, 0.5, 2000
SCALE, GOOD_STEPS = range(2)


class LossScale:
    """The factor of one phase's losses. It is part of the training state."""

    def __init__(self, device: torch.device) -> None:
        self._memory = torch.tensor([START, 0.0], dtype=torch.float32, device=device)

    def piece(self, phase: str, is_primary: bool) -> Piece:
        return whole(f"optimizer.{phase}.loss_scale", self._memory, is_primary)

    def raised(self, loss: torch.Tensor) -> torch.Tensor:
        return loss * self._memory[SCALE]

    def lower(self, gradients: list[torch.Tensor]) -> None:
        """Take the factor out of gradients, in place; they may be in the host's memory."""
        torch._foreach_mul_(gradients, (1.0 / self._memory[SCALE]).to(gradients[0].device))

    def accepts(self, norm: torch.Tensor) -> bool:
        """Whether a step with gradients of this norm may be taken; the factor is then fit for the next one.

        Waits for the device.
        """
        with torch.no_grad():
            if not bool(torch.isfinite(norm)):
                self._memory[SCALE] *= BACKOFF
                self._memory[GOOD_STEPS] = 0
                return False
            self._memory[GOOD_STEPS] += 1
            if int(self._memory[GOOD_STEPS]) == INTERVAL:
                self._memory[SCALE] *= GROWTH
                self._memory[GOOD_STEPS] = 0
        return True
