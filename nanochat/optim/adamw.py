"""The update rules of Muon and AdamW: pure functions on tensors, batched, with no state of their own."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Solved for five iterations, safety 2e-2, cushion 2 (arXiv 2505.16932).
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)

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


def sum_of_squares(x: Tensor) -> Tensor:
    """(K, ...) -> (K,) fp32."""
    norms: Tensor = torch.linalg.vector_norm(x.flatten(1), dim=1)
    return norms.square()


def _frobenius(x: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.matrix_norm(x, keepdim=True)
    return norms
