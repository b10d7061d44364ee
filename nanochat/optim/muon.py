"""Muon: momentum orthogonalized by Polar Express, with the variance reduction of NorMuon.

All matrices of one shape are updated in one batch of products.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nanochat.config.plan import GroupPlan
from nanochat.optim.rates import MatrixOptions, StepRates, sum_of_squares

# Solved for five iterations, safety 2e-2, cushion 2 (arXiv 2505.16932).
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


class Muon:
    """Muon, whose learning rate is multiplied by sqrt(max(1, m / n))."""

    def __init__(self, like: Tensor, group: GroupPlan, dtype: torch.dtype, options: MatrixOptions) -> None:
        self.group, self.dtype, self.norm_factor = group, dtype, options.polar_norm_factor
        self.function = muon_update
        count, m, n = like.shape
        self.lr = group.lr * math.sqrt(max(1.0, m / n))
        second_moment = like.new_zeros(count, *((m, 1) if m >= n else (1, n)))
        self.moments = {"momentum": torch.zeros_like(like), "second_moment": second_moment}

    def update(self, params: Tensor, grads: Tensor, rates: StepRates) -> Tensor:
        """Update parameters and moments in place; (K,) sums of squares of the change."""
        return self.function(
            params,
            grads,
            *self.moments.values(),
            lr=rates.lr_mult_tensor * self.lr,
            momentum=rates.momentum_tensor,
            weight_decay=rates.weight_decay_tensor,
            beta2=self.group.beta2,
            ok=rates.ok,
            dtype=self.dtype,
            norm_factor=self.norm_factor,
        )

    def compile(self) -> None:
        """Let torch.compile make the update."""
        self.function = torch.compile(muon_update, dynamic=False)


def muon_update(
    params: Tensor,
    grads: Tensor,
    momentum_buffer: Tensor,
    second_moment: Tensor,
    *,
    lr: Tensor,
    momentum: Tensor,
    weight_decay: Tensor,
    beta2: float,
    ok: Tensor,
    dtype: torch.dtype,
    norm_factor: float,
) -> Tensor:
    """Update K matrices of one shape in place; returns (K,) sums of squares of what was subtracted.

    Nesterov momentum; row equilibration (MuonEq, arXiv 2603.28254); Polar Express; rescaling to Frobenius
    norm sqrt(min(m, n)) (Muon+, arXiv 2602.21545); per-row or per-column variance reduction (NorMuon, arXiv
    2510.05491); decoupled weight decay where the update agrees in sign with the weight (arXiv 2510.12402).

    Args:
        params: (K, m, n) fp32.
        grads: (K, m, n) fp32.
        momentum_buffer: (K, m, n) fp32.
        second_moment: (K, m, 1) fp32 if m >= n, else (K, 1, n).
        lr: 0-dim on the device, as the next two; the shape's factor included.
        momentum: 0-dim.
        weight_decay: 0-dim.
        beta2: decay of the second moment.
        ok: 0-dim bool; where it is False nothing changes, whatever the gradient holds.
        dtype: of the matrix products.
        norm_factor: safety factor on the norm before Polar Express.
    """
    m, n = params.shape[-2:]
    live = ok.to(params.dtype)
    grads = torch.where(ok, grads, 0.0)
    momentum_buffer.lerp_(grads, live * (1 - momentum))
    u = grads.lerp(momentum_buffer, momentum)
    row_norm = u.norm(dim=-1, keepdim=True)
    frobenius = row_norm.norm(dim=-2, keepdim=True)
    u = u * (frobenius / math.sqrt(m) / row_norm.clamp(min=1e-6))
    x = (u / (norm_factor * _frobenius(u) + 1e-6)).to(dtype)
    x = polar_express(x).float()
    x = x * (math.sqrt(min(m, n)) / _frobenius(x).clamp(min=1e-10))
    variance = x.square().mean(dim=-1 if m >= n else -2, keepdim=True)
    second_moment.lerp_(variance, live * (1 - beta2))
    y = x * second_moment.clamp(min=1e-10).rsqrt()
    y = y * (_frobenius(x) / _frobenius(y).clamp(min=1e-10))
    y = y + weight_decay * params * (y * params >= 0)
    y = live * lr * y
    params.sub_(y)
    return sum_of_squares(y)


def polar_express(x: Tensor) -> Tensor:
    """Push the singular values of each matrix of x (K, m, n), of spectral norm at most 1, towards 1.

    Five odd polynomials a X + b (X X^T) X + c (X X^T)^2 X, with the smaller Gram matrix of the two.
    """
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _frobenius(x: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(x, keepdim=True)  # type: ignore[no-any-return]
