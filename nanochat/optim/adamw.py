"""AdamW by PyTorch's fused kernel, for tables, small parameters and matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat.config.plan import GroupPlan
from nanochat.optim.rates import MatrixOptions, StepRates, sum_of_squares

# Elements of a table updated at a time, since the change of each is taken by a copy of what was there: on a
# CPU the copy stays in cache.
CHANGE_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 26}


@dataclass(frozen=True)
class AdamRates:
    """Numbers of one AdamW step.

    Attributes:
        lr: learning rate.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, multiplied by lr.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


class AdamW:
    """AdamW, with the weight decay of the schedule."""

    def __init__(self, like: Tensor, group: GroupPlan, dtype: torch.dtype, options: MatrixOptions) -> None:
        self.group = group
        self.moments = {
            "exp_avg": torch.zeros_like(like),
            "exp_avg_sq": torch.zeros_like(like),
            "step": like.new_zeros(len(like)),
        }

    def update(self, params: Tensor, grads: Tensor, rates: StepRates) -> Tensor:
        """Update parameters and moments in place; (K,) sums of squares of the change."""
        group = self.group
        adam = AdamRates(group.lr * rates.lr_mult, group.beta1, group.beta2, group.eps, rates.weight_decay)
        matrices = zip(params, grads, *self.moments.values(), strict=True)
        return torch.cat([adamw_update(*tensors, rates=adam, ok=rates.ok) for tensors in matrices])

    def compile(self) -> None:
        """Nothing: it is one kernel already."""


def adamw_update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    *,
    rates: AdamRates,
    ok: Tensor,
) -> Tensor:
    """AdamW in place by PyTorch's fused kernel; returns the sum of squares of the change, (1,).

    p <- p (1 - lr wd);  p <- p - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps).

    Args:
        param: fp32, contiguous, as the next three.
        grad: of the same shape.
        exp_avg: first moment m.
        exp_avg_sq: second moment v.
        step: 0-dim fp32, updates so far; advanced here.
        rates: numbers of this step.
        ok: 0-dim bool; where it is False nothing changes, whatever the gradient holds.
    """
    step.add_(ok)
    found_inf = (~ok).to(torch.float32)
    square = param.new_zeros(1)
    size = CHANGE_ELEMENTS.get(param.device.type, CHANGE_ELEMENTS["cuda"])
    parts = (torch.split(tensor.view(-1), size) for tensor in (param, grad, exp_avg, exp_avg_sq))
    for p, g, m, v in zip(*parts, strict=True):
        before = p.clone()
        torch._fused_adamw_(
            [p],
            [g],
            [m],
            [v],
            [],
            [step],
            found_inf=found_inf,
            amsgrad=False,
            beta1=rates.beta1,
            beta2=rates.beta2,
            lr=rates.lr,
            weight_decay=rates.weight_decay,
            eps=rates.eps,
            maximize=False,
        )
        square += sum_of_squares(before.sub_(p)[None])
    return square
