"""Triton kernels of embedding tables: rows gathered and cast in one pass, gradients of rows added in order.

Legend: N tokens, V rows of a table, C its width. Tokens are sorted by id, so that those of an id lie together
and a program adds them up alone, always in the same order: no atomic addition, whose order is chance.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

GATHERED_TOKENS, GATHERED_COLUMNS = 4, 512  # of a program of `gather`: four loads of 128 bits a thread
COLUMNS, ROWS = 256, 8  # of the gradients that a program of `add_pieces` holds at a time, with one warp
PROGRAMS = 2048  # of `add_pieces`, by block of columns: 16 a multiprocessor of 132
# A piece is at most that many tokens of one id. A frequent token is a twentieth of all: of 32,768, 1,600 that
# one program would add up while the others have long finished.
PIECE = 256


@triton.jit
def gather(
    table: tl.tensor,
    ids: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    width: tl.tensor,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """out[n] = table[ids[n]] in the dtype of out, for a block of the N = count tokens and one of columns."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (token < count)[:, None] & (column < width)[None, :]
    id = tl.load(ids + token, mask=token < count, other=0)
    rows = tl.load(table + id[:, None] * width + column[None, :], mask=inside)
    at = out + token[:, None] * width + column[None, :]
    tl.store(at, rows.to(out.dtype.element_ty), mask=inside)


@triton.jit
def add_pieces(
    total: tl.tensor,
    partial: tl.tensor,
    grad: tl.tensor,
    ids: tl.tensor,
    tokens: tl.tensor,
    starts: tl.tensor,
    count: tl.tensor,
    width: tl.tensor,
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Sum the gradients of every piece, in fp32; add the sum to the row of `total` that the piece's id names.

    A piece that goes on with an id begins at a multiple of PIECE, and leaves its sum in that row of `partial`
    for `add_partial`: a row of `total` has one program that adds to it. Program i takes the pieces i,
    i + programs, ...; how many there are is known to the device alone, so that no host waits for it.

    Args:
        total: (V, C) fp32 gradient of the table.
        partial: (ceil(N / PIECE), C) fp32.
        grad: (N, C) gradients of the rows of the tokens.
        ids: (N,) sorted ids.
        tokens: (N,) the token of each sorted id.
        starts: (N,) where pieces begin among the sorted ids; N after the last.
        count: N.
        width: C.
        PIECE: most tokens of a piece.
        ROWS: gradients that are loaded at a time.
        COLUMNS: columns of a program.
    """
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    piece = tl.program_id(0)
    start = tl.load(starts + piece)
    while start < count:
        end = tl.load(starts + piece + 1, mask=piece + 1 < count, other=count)
        id = tl.load(ids + start).to(tl.int64)
        begins = (start % PIECE != 0) | (tl.load(ids + start - 1, mask=start > 0, other=-1) != id)
        to = total + id * width + column
        so_far = tl.load(to, mask=column < tl.where(begins, width, 0), other=0.0)
        sums = tl.zeros((COLUMNS,), tl.float32)
        for first in range(start, end, ROWS):
            place = first + tl.arange(0, ROWS)
            token = tl.load(tokens + place, mask=place < end, other=0)
            at = token[:, None] * width + column[None, :]
            rows = tl.load(grad + at, mask=(place < end)[:, None] & inside[None, :], other=0.0)
            sums += tl.sum(rows.to(tl.float32), 0)
        if begins:
            tl.store(to, so_far + sums, mask=inside)
        else:
            tl.store(partial + start // PIECE * width + column, sums, mask=inside)
        piece += tl.num_programs(0)
        start = tl.load(starts + piece, mask=piece < count, other=count)


@triton.jit
def add_partial(
    total: tl.tensor,
    partial: tl.tensor,
    ids: tl.tensor,
    count: tl.tensor,
    width: tl.tensor,
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Add the rows of `partial` that go on with one id; arguments as in `add_pieces`.

    Program i begins at row i + 1, and only if that is the first row of its id.
    """
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    first = tl.program_id(0) + 1
    start = first * PIECE
    id = tl.load(ids + start)
    goes_on = tl.load(ids + start - 1) == id
    before = start - PIECE  # where the row before begins: does that one go on with this id, too?
    begins = (tl.load(ids + before) != id) | (tl.load(ids + before - 1, mask=before > 0, other=-1) != id)
    if goes_on & begins:
        sums = tl.zeros((COLUMNS,), tl.float32)
        row = first + tl.arange(0, ROWS)
        same = tl.load(ids + row * PIECE, mask=row * PIECE < count, other=-1) == id
        while tl.sum(same.to(tl.int32), 0) > 0:
            at = row[:, None] * width + column[None, :]
            sums += tl.sum(tl.load(partial + at, mask=same[:, None] & inside[None, :], other=0.0), 0)
            row += ROWS
            same = tl.load(ids + row * PIECE, mask=row * PIECE < count, other=-1) == id
        to = total + id.to(tl.int64) * width + column
        tl.store(to, tl.load(to, mask=inside) + sums, mask=inside)


@torch.library.custom_op("nanochat::gather_rows", mutates_args=())
def gather_rows(table: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """(V, C) table and (N,) int64 ids below V -> (N, C) rows in a dtype, in one pass."""
    count, width = ids.size(0), table.size(1)
    out = table.new_empty(count, width, dtype=dtype)
    blocks = (-(-count // GATHERED_TOKENS), -(-width // GATHERED_COLUMNS))
    sizes = {"TOKENS": GATHERED_TOKENS, "COLUMNS": GATHERED_COLUMNS}
    gather[blocks](table, ids, out, count, width, **sizes, num_warps=4, enable_fp_fusion=True)
    return out


@gather_rows.register_fake
def _(table: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """The shape of what is gathered."""
    return table.new_empty(ids.size(0), table.size(1), dtype=dtype)


@torch.library.custom_op("nanochat::add_rows", mutates_args=("total",))
def add_rows(total: Tensor, grad: Tensor, ids: Tensor, tokens: Tensor, starts: Tensor) -> None:
    """Add the gradients of the rows of tokens to those of the table, each id's in a fixed order.

    Args:
        total: (V, C) fp32 gradient of the table, to which is added.
        grad: (N, C), contiguous, in any dtype.
        ids: (N,) sorted ids.
        tokens: (N,) the token of each sorted id.
        starts: (N,) where pieces begin, N after the last: see `add_pieces`.
    """
    (count, width), pieces = grad.shape, -(-grad.size(0) // PIECE)
    partial = total.new_empty(pieces, width, dtype=torch.float32)
    blocks = -(-width // COLUMNS)
    sizes = {"PIECE": PIECE, "ROWS": ROWS, "COLUMNS": COLUMNS, "num_warps": 1, "enable_fp_fusion": True}
    add_pieces[min(count, PROGRAMS), blocks](total, partial, grad, ids, tokens, starts, count, width, **sizes)
    if pieces > 1:
        add_partial[pieces - 1, blocks](total, partial, ids, count, width, **sizes)


@add_rows.register_fake
def _(total: Tensor, grad: Tensor, ids: Tensor, tokens: Tensor, starts: Tensor) -> None:
    """Nothing is made: what is added to exists."""
