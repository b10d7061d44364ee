"""Triton kernel that adds gradients of one or two micro-batches to that of an fp32 master, in one pass.

As single operations of torch the total is read and written once a micro-batch; here once for two of them: 12
bytes a weight for both, and not 20.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 1024, 4  # 8 elements a thread: loads of 128 bits in bf16


@triton.jit
def add(
    total: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    count: tl.tensor,
    FRESH: tl.constexpr,
    PAIR: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Add to a block of the total, or fill it where it is fresh; in the order in which the gradients came."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    grad = tl.load(first + at, mask=there).to(tl.float32)
    if not FRESH:
        grad = tl.load(total + at, mask=there) + grad
    if PAIR:
        grad += tl.load(second + at, mask=there).to(tl.float32)
    tl.store(total + at, grad, mask=there)


@torch.library.custom_op("nanochat::add_gradients", mutates_args=("total",))
def add_gradients(total: Tensor, first: Tensor, second: Tensor | None, fresh: bool) -> None:
    """Add gradients to a total; an operator of torch, so that fake tensors pass it.

    Args:
        total: fp32, contiguous.
        first: of its shape, in the compute dtype, contiguous as the next.
        second: of the micro-batch after it, if there is one.
        fresh: whether the total holds nothing yet, and is filled.
    """
    count, flags = total.numel(), {"FRESH": fresh, "PAIR": second is not None, "BLOCK": BLOCK}
    add[(triton.cdiv(count, BLOCK),)](total, first, second, count, **flags, num_warps=WARPS)


@add_gradients.register_fake
def _(total: Tensor, first: Tensor, second: Tensor | None, fresh: bool) -> None:
    pass
