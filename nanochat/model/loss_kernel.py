"""Triton kernel of the loss: cross-entropy and its derivative by the logits, six bytes a logit in bf16.

As single operations of torch the same takes seven passes over fp32 copies of the logits, about 60 bytes a
logit. Here a program has a row: it reads the logits once for the sum of the exponentials, and once more,
mostly from the L2 cache, to write the derivative over them. No maximum is looked for: the softcap bounds the
exponent. Legend: R rows, V vocabulary, V' >= V columns, those from V on being padding.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 4096, 8  # columns that a program holds at a time: 16 a thread, two loads of 128 bits in bf16
# exp(softcap) times the vocabulary must be a finite fp32 number, and exp(-softcap) no denormal one.
MAX_SOFTCAP = 70.0
# A quarter of a derivative is at most 1/4; times this it is below the largest number of fp8 e5m2, 57,344, and
# 1 / (4 V), which most are about, is far above the smallest: no largest element has to be looked for.
NARROW_BOOST = 2.0**17


# With s = sigmoid(2 z / softcap), the softcapped logit is outer * (s - 1/2) in units of log 2, for which the
# device has its exponential; `inner` is -2 / softcap in the same unit.
@triton.jit
def row_losses(
    z: tl.tensor,
    targets: tl.tensor,
    losses: tl.tensor,
    hits: tl.tensor,
    narrow: tl.tensor,
    weights: tl.tensor,
    row_stride: tl.tensor,
    vocab: tl.tensor,
    columns: tl.tensor,
    inner: tl.tensor,
    outer: tl.tensor,
    boost: tl.tensor,
    narrow_boost: tl.tensor,
    WITH_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Fill the loss of row `program_id`, and as asked its hit and its derivative, which replaces z.

    The derivative is multiplied by the row's weight, if there are any, before it is rounded; times
    `narrow_boost` it is written to `narrow` besides, if that is there.
    """
    row = tl.program_id(0).to(tl.int64)
    z += row * row_stride
    target = tl.load(targets + row)
    counts = target >= 0
    z_target = tl.load(z + tl.where(counts, target, 0)).to(tl.float32)
    capped_target = outer * (1.0 / (1.0 + tl.exp2(inner * z_target)) - 0.5)
    sums = tl.zeros((BLOCK,), tl.float32)
    better = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        # The mask is the one of the row, not of the vocabulary, so that loads are wide for any vocabulary.
        logit = tl.load(z + column, mask=column < columns, other=0.0, eviction_policy="evict_last")
        logit = logit.to(tl.float32)
        s = 1.0 / (1.0 + tl.exp2(inner * logit))
        sums += tl.where(column < vocab, tl.exp2(outer * (s - 0.5)), 0.0)
        if hits is not None:
            before = (logit == z_target) & (column < target)  # of equal logits the first is the likeliest
            better += (((logit > z_target) | before) & (column < vocab)).to(tl.int32)
    log_sum = tl.log2(tl.sum(sums, 0))
    loss = (log_sum - capped_target) * 0.6931471805599453
    tl.store(losses + row, tl.where(counts, loss, 0.0))
    if hits is not None:
        tl.store(hits + row, counts & (tl.sum(better, 0) == 0) & (loss == loss))
    if WITH_GRAD:
        if weights is not None:
            boost *= tl.load(weights + row)
        factor = tl.where(counts, boost, 0.0)
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            logit = tl.load(z + column, mask=column < columns, other=0.0, eviction_policy="evict_first")
            s = 1.0 / (1.0 + tl.exp2(inner * logit.to(tl.float32)))
            p = tl.exp2(outer * (s - 0.5) - log_sum)
            p = tl.where(column == target, p - 1.0, p) * (factor * s * (1.0 - s))
            p = tl.where(column < vocab, p, 0.0)
            tl.store(z + column, p.to(z.dtype.element_ty), mask=column < columns)
            if narrow is not None:
                at = narrow + row * columns + column
                tl.store(at, (p * narrow_boost).to(narrow.dtype.element_ty), mask=column < columns)


@torch.library.custom_op("nanochat::softcapped_losses", mutates_args=("z", "losses", "hits", "narrow"))
def softcapped_losses(
    z: Tensor,
    targets: Tensor,
    losses: Tensor,
    hits: Tensor | None,
    softcap: float,
    vocab_size: int,
    boost: float,
    with_grad: bool,
    narrow: Tensor | None = None,
    weights: Tensor | None = None,
) -> None:
    """Cross-entropy of softcapped logits, as one kernel; an operator of torch, so that fake tensors pass it.

    Args:
        z: (R, V') logits before the softcap, with contiguous rows. With `with_grad` each turns into a quarter
            of the derivative of its row's loss, times `boost`; in padding and ignored rows into zero.
        targets: (R,) int64 token ids below vocab_size; a row whose target is negative is ignored.
        losses: (R,) fp32, filled with nats, zero where ignored.
        hits: (R,) bool, filled with whether the target is the likeliest token, False where ignored.
        softcap: bound of the logits, at most MAX_SOFTCAP.
        vocab_size: V.
        boost: factor on the derivatives.
        with_grad: whether z turns into them.
        narrow: (R, V') fp8 e5m2, filled with the derivatives times NARROW_BOOST.
        weights: (R,) fp32 factors on the derivatives, from -1 to 1; the losses stay as they are.
    """
    assert z.stride(1) == 1, "rows of logits must be contiguous"
    assert 0 < softcap <= MAX_SOFTCAP, f"softcap {softcap}"
    row_losses[(z.size(0),)](
        z,
        targets,
        losses,
        hits,
        narrow,
        weights,
        z.stride(0),
        vocab_size,
        z.size(1),
        -2 / softcap / math.log(2),
        2 * softcap / math.log(2),
        boost,
        NARROW_BOOST / boost,
        WITH_GRAD=with_grad,
        BLOCK=BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )


@softcapped_losses.register_fake
def _(
    z: Tensor,
    targets: Tensor,
    losses: Tensor,
    hits: Tensor | None,
    softcap: float,
    vocab_size: int,
    boost: float,
    with_grad: bool,
    narrow: Tensor | None = None,
    weights: Tensor | None = None,
) -> None:
    """Nothing is made: what is filled exists."""
