"""fp8 linear layer, on GPUs from Hopper on: twice the matmul rate of bf16 for wide layers.

Each of the three products (forward, gradient of the input, gradient of the weight) takes two fp8 tensors,
each with one scale computed from its own largest element: activations and weights in e4m3 (3 bits of
mantissa), gradients in e5m2 (2, with more range). Legend: N tokens, `in` and `out` the widths of the layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MIN_SIDE, SIDE_MULTIPLE = 128, 16  # below, a product is not worth it; the kernels want multiples of 16
TINY = 1e-30  # the least largest element that is scaled up, so that a tensor of zeros has a scale


def fits(in_features: int, out_features: int) -> bool:
    """Whether a layer of these widths is computed in fp8."""
    sides = (in_features, out_features)
    return min(sides) >= MIN_SIDE and all(side % SIDE_MULTIPLE == 0 for side in sides)


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """X in fp8, filling its range, and the 0-dim fp32 scale that brings it back: x ~ quantized * scale."""
    largest = torch.finfo(dtype).max
    scale = x.abs().amax().float().clamp(min=TINY) / largest
    # Divided, not multiplied by a reciprocal, and clamped: a rounding above the range would be NaN in e4m3.
    return (x.float() / scale).clamp(-largest, largest).to(dtype), scale


def by_columns(x: Tensor) -> Tensor:
    """The same matrix with its columns contiguous, as the second factor of a product must lie."""
    return x.t().contiguous().t()


class Fp8Linear(torch.autograd.Function):
    """x @ weight.T; keeps both factors for the backward pass in fp8, half of what bf16 would take."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """(N, in) in the compute dtype, (out, in) fp32 master -> (N, out) in the compute dtype."""
        x8, x_scale = quantize(x, E4M3)
        w8, w_scale = quantize(weight, E4M3)
        ctx.save_for_backward(x8, x_scale, w8, w_scale)
        ctx.weight_dtype = weight.dtype
        # The fast accumulation of Hopper rounds partial sums: in the forward pass alone (RECIPE 2.4).
        product: Tensor = torch._scaled_mm(
            x8, w8.t(), x_scale, w_scale, out_dtype=x.dtype, use_fast_accum=True
        )
        return product

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """(N, out) -> gradients of x, in its dtype, and of the weight, in fp32."""
        x8, x_scale, w8, w_scale = ctx.saved_tensors
        g8, g_scale = quantize(grad, E5M2)
        grad_x = torch._scaled_mm(g8, by_columns(w8), g_scale, w_scale, out_dtype=grad.dtype)
        g8_rows = g8.t().contiguous()
        grad_weight = torch._scaled_mm(g8_rows, by_columns(x8), g_scale, x_scale, out_dtype=ctx.weight_dtype)
        return grad_x, grad_weight


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """(..., in) -> (..., out) in fp8; the number of tokens must be a multiple of 16."""
    flat = x.flatten(0, -2)
    assert flat.size(0) % SIDE_MULTIPLE == 0, f"{flat.size(0)} tokens"
    out: Tensor = Fp8Linear.apply(flat, weight)
    return out.view(*x.shape[:-1], -1)
