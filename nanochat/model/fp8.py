"""fp8 products, on GPUs from Hopper on: twice the matmul rate of bf16 for wide layers.

Each of the three products of a linear layer (forward, gradient of the input, gradient of the weight) takes
two fp8 tensors, each with one scale: activations and weights in e4m3 (3 bits of mantissa), gradients in e5m2
(2, with more range). The matrix units want the summed dimension of both factors contiguous, so every tensor
is needed by rows for one product and by columns for another. Legend: N tokens, `in` and `out` the widths.

What goes over memory is what this file saves. A weight is quantized once a step, in both layouts. So is an
activation or a gradient where it is made, and backward reads what forward wrote: the operators that turn a
matrix are opaque to a compiler, which would keep bf16 otherwise and quantize it again. And no pass looks for
the largest element of anything that is N long:

- RMS-normed inputs have |x_i| <= sqrt(in), which is their scale. e4m3 has 15 binades of normal numbers below
  it: the rms error is 2.64 % of the tensor, as with the true largest element (N = 4,096, in = 1,536).
- Other activations and gradients take the largest element of 1,024 rows, times 8 in e4m3 and times 256 in
  e5m2, which has 30 binades. The errors are those of the true largest element, 2.6 % and 5.3 %, also where
  the rows of a weight differ by a lognormal factor and 1 % of the tokens have a channel 200 times as large.
  What is larger still becomes the end of the range. Of gradients many rows may be zero, those of tokens that
  no loss counts, and the scale of zeros would end all others: as many elements are taken from all rows.

Nothing is remembered from one step to the next, so that a run that was stopped continues bit for bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MIN_SIDE, SIDE_MULTIPLE = 128, 16  # below, a product is not worth it; the kernels want multiples of 16
TINY = 1e-30  # the least largest element that is scaled up, so that a tensor of zeros has a scale
SAMPLED_ROWS = 1024  # about as many are looked at for the largest element, all of them where there are fewer
MARGIN = {E4M3: 8.0, E5M2: 256.0}  # of what the sampled rows show


class Fp8Weight(NamedTuple):
    """Weight in fp8 by rows, for forward, and by columns, for the gradient of the input.

    Attributes:
        rows: (out, in) e4m3.
        columns: (in, out) e4m3, contiguous.
        scale: 0-dim fp32; weight ~ rows * scale.
    """

    rows: Tensor
    columns: Tensor
    scale: Tensor


def fits(in_features: int, out_features: int) -> bool:
    """Whether a layer of these widths is computed in fp8."""
    sides = (in_features, out_features)
    return min(sides) >= MIN_SIDE and all(side % SIDE_MULTIPLE == 0 for side in sides)


@torch.no_grad()
def quantize_weight(weight: Tensor) -> Fp8Weight:
    """The weight (out, in), of any dtype, in fp8: once a step, from the fp32 master.

    Once a micro-batch it was 9.5 GB at depth 24. The scale is of the true largest element: a weight is short.
    """
    # Not abs().amax(), which would write the absolute values.
    scale = scale_for(torch.linalg.vector_norm(weight, torch.inf), E4M3)
    rows, columns = quantize_both(weight, scale, E4M3)
    return Fp8Weight(rows, columns, scale)


def scale_for(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale, 0-dim fp32, with which a largest element, likewise, fills the range of a dtype."""
    return largest.float().clamp(min=TINY) / torch.finfo(dtype).max


def sampled(x: Tensor) -> Tensor:
    """Rows of x (N, width) at equal distances, the first among them.

    In a batch these are every 32nd position or so, and the beginnings of all sequences, where attention has
    its sink and values are largest.
    """
    return x[:: max(1, x.size(0) // SAMPLED_ROWS)]


def sampled_scale(x: Tensor) -> Tensor:
    """The 0-dim fp32 scale in e4m3 of x (N, width) from some of its rows, without a pass over the rest."""
    return scale_for(MARGIN[E4M3] * sampled(x).abs().amax().float(), E4M3)


def gradient_scale(grad: Tensor) -> Tensor:
    """The 0-dim fp32 scale in e5m2 of a gradient (N, width) from 16 channels of each row, others in the next.

    Of up to SAMPLED_ROWS rows all elements are taken.
    """
    sectors = grad.reshape(-1, SIDE_MULTIPLE)
    if grad.size(0) > SAMPLED_ROWS:
        sectors = sectors[:: max(1, grad.size(1) // SIDE_MULTIPLE - 1)]
    return scale_for(MARGIN[E5M2] * sectors.abs().amax().float(), E5M2)


def loudest_rows(grad: Tensor) -> Tensor:
    """(M,) int64: as many rows of a gradient (N, width) as `sampled` takes, of successive rows the largest.

    Largest in its first channel, so that no row is taken that is zero where one beside it is not.
    """
    step = max(1, grad.size(0) // SAMPLED_ROWS)
    size = F.pad(grad[:, 0].abs(), (0, -grad.size(0) % step), value=-1.0)
    return torch.arange(0, len(size), step, device=grad.device) + size.view(-1, step).argmax(1)


def quantize(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """X in fp8 by its scale: x ~ result * scale."""
    largest = torch.finfo(dtype).max
    # Divided, not multiplied by a reciprocal, and clamped: a rounding above the range would be NaN in e4m3.
    return (x.float() / scale).clamp(-largest, largest).to(dtype)


@torch.library.custom_op("nanochat::quantize_both", mutates_args=())
def quantize_both(x: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`quantize` of x (N, width) by rows, (N, width), and by columns, (width, N), reading it once."""
    if x.is_cuda:
        from nanochat.model.fp8_kernels import turn  # here: not every machine has Triton

        return turn(x.contiguous(), scale, dtype)
    rows = quantize(x, scale, dtype)
    return rows, rows.t().contiguous()


@quantize_both.register_fake
def _(x: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    count, width = x.shape
    return x.new_empty(count, width, dtype=dtype), x.new_empty(width, count, dtype=dtype)


@torch.library.custom_op("nanochat::turned", mutates_args=())
def turned(x8: Tensor) -> Tensor:
    """An fp8 matrix (N, width) by columns, (width, N); for rows that another kernel has written."""
    if x8.is_cuda:
        from nanochat.model.fp8_kernels import turn

        return turn(x8.contiguous(), None, x8.dtype)[1]
    return x8.t().contiguous()


@turned.register_fake
def _(x8: Tensor) -> Tensor:
    return x8.new_empty(x8.size(1), x8.size(0))


def quantize_input(x: Tensor, bound: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """X (N, in) by rows and by columns, in e4m3, and its scale.

    A bound that is known without reading x lets a compiler write the rows in the kernel that makes x.
    """
    if bound is None:
        scale = sampled_scale(x)
        return *quantize_both(x, scale, E4M3), scale
    scale = x.new_full((), bound / torch.finfo(E4M3).max, dtype=torch.float32)
    rows = quantize(x, scale, E4M3)
    return rows, turned(rows), scale


def product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype, fast: bool) -> Tensor:
    """A (M, K) times b (L, K), both contiguous, -> (M, L) in a dtype.

    The fast accumulation of Hopper rounds partial sums: in the forward pass alone (RECIPE 2.4).
    """
    result: Tensor = torch._scaled_mm(a, b.t(), a_scale, b_scale, out_dtype=dtype, use_fast_accum=fast)
    return result


class Fp8Linear(torch.autograd.Function):
    """x @ weight.T; keeps x by columns for the backward pass in fp8, half of what bf16 would take."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, leaf: Tensor, rows: Tensor, columns: Tensor, scale: Tensor, bound: float | None
    ) -> Tensor:
        """(N, in) -> (N, out), in the dtype of x; the leaf (out, in) only gets the gradient."""
        x8, x_columns, x_scale = quantize_input(x, bound)
        ctx.save_for_backward(x_columns, x_scale, columns, scale)
        ctx.dtype = leaf.dtype
        return product(x8, x_scale, rows, scale, x.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """(N, out) -> gradients of x and of the leaf, in their dtypes."""
        x_columns, x_scale, columns, scale = ctx.saved_tensors
        g_scale = gradient_scale(grad)
        g8, g_columns = quantize_both(grad, g_scale, E5M2)
        grad_x = product(g8, g_scale, columns, scale, grad.dtype, fast=False)
        grad_weight = product(g_columns, g_scale, x_columns, x_scale, ctx.dtype, fast=False)
        return grad_x, grad_weight, None, None, None, None


def linear(x: Tensor, leaf: Tensor, weight: Fp8Weight | None = None, bound: float | None = None) -> Tensor:
    """(..., in) -> (..., out) in fp8.

    Args:
        x: its number of tokens must be a multiple of 16.
        leaf: (out, in), the weight in any dtype; gets the gradient, in its dtype.
        weight: the same in fp8; by default made here, as costs a pass over the leaf.
        bound: of |x|, if it is known without reading x: sqrt(in) behind an RMS norm.
    """
    flat = x.flatten(0, -2)
    assert flat.size(0) % SIDE_MULTIPLE == 0, f"{flat.size(0)} tokens"
    weight = quantize_weight(leaf) if weight is None else weight
    out: Tensor = Fp8Linear.apply(flat, leaf, *weight, bound)
    return out.view(*x.shape[:-1], -1)
