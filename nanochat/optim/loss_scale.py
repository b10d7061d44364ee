"""Dynamic loss scale for fp16, whose gradients have to stay within 6e-8 to 65,504.

The scale stays on the device, so that adjusting it does not synchronise. In any other dtype it is 1 and
changes no number.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

START = 2.0**16
GROWTH_STEPS = 2000  # without an overflow, after which the factor is doubled


class LossScale:
    """A power of two, so that scaling the loss up and the gradients down is exact where nothing overflows.

    Attributes:
        factor: 0-dim fp32.
        calm_steps: 0-dim fp32, steps since the factor last changed.
    """

    def __init__(self, compute_dtype: torch.dtype, device: torch.device) -> None:
        """Scale if the compute dtype is fp16."""
        self.active = compute_dtype == torch.float16
        self.factor = torch.full((), START if self.active else 1.0, device=device)
        self.calm_steps = torch.zeros((), device=device)

    def up(self, loss: Tensor) -> Tensor:
        """The loss to call backward on."""
        return loss * self.factor if self.active else loss

    def down(self, parameters: Iterable[Tensor]) -> None:
        """Bring the gradients back to those of the loss itself, in place."""
        if self.active:
            grads = [p.grad for p in parameters if p.grad is not None]
            torch._foreach_mul_(grads, 1 / self.factor)

    def adjust(self, applied: Tensor, loss: Tensor) -> Tensor:
        """Halve the factor after an overflow, double it after GROWTH_STEPS steps without one.

        Args:
            applied: 0-dim bool, the step was not held back.
            loss: 0-dim, the same on all ranks.

        Returns:
            0-dim bool: the step was held back by an overflow that a smaller factor can mend. A loss that is
            not finite itself, or a factor that has come down to 1, is no such case.
        """
        overflow = ~applied & torch.isfinite(loss) & (self.factor > 1)
        if self.active:
            self.calm_steps = torch.where(applied, self.calm_steps + 1, 0.0)
            grow = self.calm_steps >= GROWTH_STEPS
            self.factor = self.factor * torch.where(overflow, 0.5, torch.where(grow, 2.0, 1.0))
            self.calm_steps = torch.where(grow, 0.0, self.calm_steps)
        return overflow

    def state(self) -> list[float]:
        """What a checkpoint keeps; waits for the device."""
        return torch.stack((self.factor, self.calm_steps)).tolist() if self.active else []

    def load(self, state: list[float]) -> None:
        """Take what `state` gave; a run that goes on in another dtype starts with its own."""
        if self.active and state:
            self.factor.fill_(state[0])
            self.calm_steps.fill_(state[1])
