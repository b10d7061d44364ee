"""AdamW by PyTorch's fused kernel: for embeddings and scalars, and as a rule for matrices.

The fused kernel reads each element once; the squares of the change are summed beside it, for the logs.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from nanochat.config.plan import GroupPlan
from nanochat.optim.rates import MatrixOptions, StepRates, sum_of_squares

# Elements of a table updated at a time, since the change of each is taken by a copy of what was there: on a
# CPU the copy stays in cache.
CHANGE_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 26}


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
        group = dataclasses.replace(self.group, weight_decay=rates.weight_decay)
        matrices = zip(params, grads, *self.moments.values(), strict=True)
        return torch.cat([adamw_update(p, g, m, v, step, group, rates) for p, g, m, v, step in matrices])

    def compile(self) -> None:
        """Nothing: it is one kernel already."""


def adamw_update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    group: GroupPlan,
    rates: StepRates,
) -> Tensor:
    """AdamW in place by PyTorch's fused kernel; returns the sum of squares of the change, (1,).

    p <- p (1 - lr wd);  p <- p - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps).

    Args:
        param: fp32, contiguous, as the next three.
        grad: of the same shape.
        exp_avg: first moment m.
        exp_avg_sq: second moment v.
        step: 0-dim fp32, updates so far; advanced here.
        group: hyperparameters of the tensor.
        rates: of this step; where its `ok` is False nothing changes, whatever the gradient holds.
    """
    step.add_(rates.ok)
    found_inf = (~rates.ok).to(torch.float32)
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
            beta1=group.beta1,
            beta2=group.beta2,
            lr=group.lr * rates.lr_mult,
            weight_decay=group.weight_decay,
            eps=group.eps,
            maximize=False,
        )
        square += sum_of_squares(before.sub_(p)[None])
    torch.autograd.graph.increment_version(param)  # the fused kernel does not, and copies are made by it
    return square
