"""The MLP's mathematics, C -> H -> C with relu squared between: as torch's operators, and fused for Hopper.

The activation between is the widest of a block: at depth 24, 20 of the 67 passes over (N, C) that a layer's
elementwise kernels make are those of relu squared. Where nothing is fused, backward keeps the square alone,
which the gradient of the second weight needs anyway: its root is the derivative. On Hopper the first product
squares in its epilogue, and backward's product multiplies by the root in its own; in fp8 they write what the
next products read, by rows and by columns.

Which is used is a fixed rule: bf16 on sm90 with sides that are multiples of the tiles. No GPU has timed it
here; modded-nanogpt's records 59 (1.820 to 1.781 min) and 87 (1.266 to 1.256) are the evidence that it pays.
Legend: N tokens, C model width, H hidden units.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.model import fp8
from nanochat.model.fp8 import E4M3, E5M2, Fp8Weight, product, quantize_both

TILES = (128, 256, 128)  # N, H and C of the fused products are multiples of these


class ReluSquared(torch.autograd.Function):
    """max(z, 0)^2, of which one tensor is kept: on CUDA the square, on other devices r = max(z, 0).

    The derivative is 2 r. The product after it keeps the square anyway, and on a GPU the root costs nothing;
    a CPU would wait for it. fp16 keeps r, too, since its square of a small number is none.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        """Any shape -> the same."""
        r = F.relu(z)
        square = r * r
        ctx.keeps_square = keeps_square(z.device.type, z.dtype)
        ctx.save_for_backward(square if ctx.keeps_square else r)
        return square

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """2 r times the gradient."""
        (kept,) = ctx.saved_tensors
        r = kept.sqrt() if ctx.keeps_square else kept
        return (grad * r).mul_(2)


def keeps_square(device_type: str, dtype: torch.dtype) -> bool:
    """Whether backward takes the root of the square instead of keeping r."""
    return device_type == "cuda" and dtype != torch.float16


def is_fused(x: Tensor, hidden: int) -> bool:
    """Whether the MLP of x (N, C) is computed by the fused kernels: training in bf16, Hopper, whole tiles."""
    if x.device.type != "cuda" or x.dtype != torch.bfloat16 or not torch.is_grad_enabled():
        return False
    whole = all(side % tile == 0 for side, tile in zip((x.size(0), hidden, x.size(1)), TILES, strict=True))
    return whole and torch.cuda.get_device_capability(x.device) == (9, 0)


def mlp(
    x: Tensor, up: Tensor, down: Tensor, up8: Fp8Weight | None = None, down8: Fp8Weight | None = None
) -> Tensor:
    """(..., C) -> (..., C).

    Args:
        x: RMS-normed, in the compute dtype.
        up: (H, C) weight in the compute dtype.
        down: (C, H) likewise.
        up8: the first weight in fp8, if both are computed in that; the others then only get the gradients.
        down8: likewise the second.
    """
    flat = x.flatten(0, -2)
    fused = is_fused(flat, up.size(0))
    if up8 is not None and down8 is not None:
        if fused:
            out: Tensor = FusedMLPInFp8.apply(flat, up, down, *up8, *down8)
            return out.view_as(x)
        hidden = ReluSquared.apply(fp8.linear(x, up, up8, bound=math.sqrt(x.size(-1))))
        return fp8.linear(hidden, down, down8)
    if fused:
        out = FusedMLP.apply(flat, up, down)
        return out.view_as(x)
    return plain_mlp(x, up, down)


def plain_mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """`mlp` by torch's operators: the slow twin of `FusedMLP`, on any device and for any shape."""
    return F.linear(ReluSquared.apply(F.linear(x, up)), down)


@torch.library.custom_op("nanochat::up_relu_squared", mutates_args=())
def up_relu_squared(x: Tensor, up: Tensor) -> Tensor:
    """max(x @ up.T, 0)^2: (N, C), (H, C) -> (N, H), on Hopper."""
    from nanochat.model import mlp_kernels  # here: not every machine has Triton

    return mlp_kernels.up(x.contiguous(), up)[0]


@up_relu_squared.register_fake
def _(x: Tensor, up: Tensor) -> Tensor:
    return x.new_empty(x.size(0), up.size(0))


@torch.library.custom_op("nanochat::down_gradient", mutates_args=())
def down_gradient(grad: Tensor, down: Tensor, post: Tensor) -> Tensor:
    """(grad @ down) * 2 sqrt(post): (N, C), (C, H), (N, H) -> (N, H), on Hopper."""
    from nanochat.model import mlp_kernels

    return mlp_kernels.down_gradient(grad.contiguous(), down, post)[0]


@down_gradient.register_fake
def _(grad: Tensor, down: Tensor, post: Tensor) -> Tensor:
    return torch.empty_like(post)


class FusedMLP(torch.autograd.Function):
    """The MLP of which only the input and the square are kept, 5 C a token instead of 9 C."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """(N, C) -> (N, C)."""
        post = up_relu_squared(x, up)
        ctx.save_for_backward(x, up, down, post)
        out: Tensor = post @ down.t()
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """(N, C) -> gradients of x, up and down."""
        x, up, down, post = ctx.saved_tensors
        grad_z = down_gradient(grad, down, post)
        return grad_z @ up, grad_z.t() @ x, grad.t() @ post


@torch.library.custom_op("nanochat::up_relu_squared_fp8", mutates_args=())
def up_relu_squared_fp8(x8: Tensor, up_rows: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """(max(x8 @ up.T * scales[0], 0))^2 * scales[1] in e4m3: (N, C), (H, C) -> (N, H) and (H, N)."""
    from nanochat.model import mlp_kernels

    post, columns = mlp_kernels.up(x8.contiguous(), up_rows, scales)
    assert columns is not None
    return post, columns


@up_relu_squared_fp8.register_fake
def _(x8: Tensor, up_rows: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    count, hidden = x8.size(0), up_rows.size(0)
    return x8.new_empty(count, hidden), x8.new_empty(hidden, count)


@torch.library.custom_op("nanochat::down_gradient_fp8", mutates_args=())
def down_gradient_fp8(
    g8: Tensor, down_columns: Tensor, post_columns: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor]:
    """(g8 @ down) sqrt(post) scales[0] scales[1] in e5m2: (N, C), (H, C), (H, N) -> (N, H), (H, N)."""
    from nanochat.model import mlp_kernels

    grad, columns = mlp_kernels.down_gradient(g8.contiguous(), down_columns, post_columns, scales)
    assert columns is not None
    return grad, columns


@down_gradient_fp8.register_fake
def _(g8: Tensor, down_columns: Tensor, post_columns: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    hidden, count = post_columns.shape
    return g8.new_empty(count, hidden), g8.new_empty(hidden, count)


class FusedMLPInFp8(torch.autograd.Function):
    """The MLP in fp8, of which the input and the square are kept by columns: 5 C bytes a token.

    The square is written in e4m3 at once, so its scale must be known before: from the product of 1,024 rows,
    3 % of the work at 32,768 tokens. Likewise that of its gradient. The root of the rounded square is off by
    1.3 % (4.5 % where the rows of the weight differ by a lognormal factor), less than the 5.3 % of the e5m2
    that it goes into.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        up: Tensor,
        down: Tensor,
        up_rows: Tensor,
        up_columns: Tensor,
        up_scale: Tensor,
        down_rows: Tensor,
        down_columns: Tensor,
        down_scale: Tensor,
    ) -> Tensor:
        """(N, C), both leaves and both weights in fp8 -> (N, C)."""
        x8, x_columns, x_scale = fp8.quantize_input(x, math.sqrt(x.size(1)))
        some = product(fp8.sampled(x8).contiguous(), x_scale, up_rows, up_scale, torch.float32, fast=True)
        largest = fp8.MARGIN[E4M3] * some.amax().clamp(min=0).square()
        post_scale = fp8.scale_for(largest, E4M3)
        scales = torch.stack((x_scale * up_scale, 1 / post_scale))
        post, post_columns = up_relu_squared_fp8(x8, up_rows, scales)
        ctx.save_for_backward(
            x_columns, x_scale, post_columns, post_scale, up_columns, up_scale, down_columns, down_scale
        )
        ctx.dtypes = up.dtype, down.dtype
        return product(post, post_scale, down_rows, down_scale, x.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """(N, C) -> gradients of x and of both leaves."""
        x_columns, x_scale, post_columns, post_scale, up_columns, up_scale, down_columns, down_scale = (
            ctx.saved_tensors
        )
        rows, g_scale = fp8.loudest_rows(grad), fp8.gradient_scale(grad)
        g8, g_columns = quantize_both(grad, g_scale, E5M2)
        some = product(g8[rows], g_scale, down_columns, down_scale, torch.float32, fast=False)
        root = post_columns.t()[rows].float().sqrt()
        factor = 2 * post_scale.sqrt()
        z_scale = fp8.scale_for(fp8.MARGIN[E5M2] * factor * (some * root).abs().amax(), E5M2)
        scales = torch.stack((factor * g_scale * down_scale, 1 / z_scale))
        z8, z_columns = down_gradient_fp8(g8, down_columns, post_columns, scales)
        up_dtype, down_dtype = ctx.dtypes
        grad_x = product(z8, z_scale, up_columns, up_scale, grad.dtype, fast=False)
        grad_up = product(z_columns, z_scale, x_columns, x_scale, up_dtype, fast=False)
        grad_down = product(g_columns, g_scale, post_columns, post_scale, down_dtype, fast=False)
        return grad_x, grad_up, grad_down, *(None,) * 6
