"""Triton kernel that writes a matrix in fp8 by rows and by columns, reading it once.

The matrix units of Hopper take both factors of an fp8 product with the summed dimension contiguous: a forward
product reads rows, a weight's gradient reads columns. Imported where it is launched, since not every machine
has Triton. Legend: N rows, C columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 128, 8  # sides of the tile that a program turns: 128 bytes are a line of the cache


@triton.jit
def rounded(value: tl.tensor, LARGEST: tl.constexpr, dtype: tl.constexpr) -> tl.tensor:
    """Fp32 as fp8; what is beyond the range becomes its end, and NaN stays, so that the loss shows it."""
    low = tl.maximum(value, -LARGEST, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(low, LARGEST, propagate_nan=tl.PropagateNan.ALL).to(dtype)


@triton.jit
def turn_kernel(
    x: tl.tensor,
    scale: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    count: tl.tensor,
    width: tl.tensor,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """X (N, C), by its scale, -> rows (N, C) and columns (C, N); without a scale only columns, of bytes."""
    row = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[:, None].to(tl.int64)
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :].to(tl.int64)
    inside = (row < count) & (column < width)
    value = tl.load(x + row * width + column, mask=inside)
    if scale is not None:
        value = rounded(value.to(tl.float32) / tl.load(scale), LARGEST, rows.dtype.element_ty)
        tl.store(rows + row * width + column, value, mask=inside)
    tl.store(columns + column * count + row, value, mask=inside)


def turn(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Launch the kernel.

    Args:
        x: (N, C), contiguous; in fp8 where there is no scale.
        scale: 0-dim fp32, or None.
        dtype: of the results.

    Returns:
        (N, C) rows, x itself without a scale; (C, N) columns.
    """
    count, width = x.shape
    columns = x.new_empty(width, count, dtype=dtype)
    rows = x if scale is None else torch.empty_like(x, dtype=dtype)
    grid = (triton.cdiv(count, BLOCK), triton.cdiv(width, BLOCK))
    largest = torch.finfo(dtype).max
    if scale is None:
        turn_kernel[grid](
            x.view(torch.uint8),
            None,
            None,
            columns.view(torch.uint8),
            count,
            width,
            largest,
            BLOCK,
            num_warps=WARPS,
        )
    else:
        turn_kernel[grid](x, scale, rows, columns, count, width, largest, BLOCK, num_warps=WARPS)
    return rows, columns
