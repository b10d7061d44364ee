"""Triton kernels: the wide products of the MLP with relu squared in them, for Hopper, in bf16 and fp8.

A product whose result is 4 C wide is written once, as what follows reads it: no elementwise pass goes over
it. Imported where a kernel is launched, since not every machine has Triton. Legend: N tokens, C model width,
H = 4 C hidden units. A tile of a result is (BM, BN), computed in steps of BK; operands come by the tensor
memory accelerator; one persistent program a multiprocessor takes tile after tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nanochat.model.fp8_kernels import rounded

GROUP = 8  # tiles in a column that are computed one after another, so that operands are found in the L2 cache
WARPS = 8


@triton.jit
def place_of(tile: tl.tensor, tiles_m: tl.tensor, tiles_n: tl.tensor, GROUP: tl.constexpr) -> tl.tuple:
    """Row and column of the tile of this number."""
    group = tile // (GROUP * tiles_n)
    first = group * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    inside = tile % (GROUP * tiles_n)
    return first + inside % size, inside // size


@triton.jit
def up_kernel(
    x: tl.tensor,
    w: tl.tensor,
    post: tl.tensor,
    columns: tl.tensor,
    scales: tl.tensor,
    rows: tl.tensor,
    hidden: tl.tensor,
    width: tl.tensor,
    EIGHT: tl.constexpr,
    LARGEST: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
) -> None:
    """max(x @ w.T, 0)^2 of x (N, C) and w (H, C) -> post (N, H), and in fp8 columns (H, N) too.

    Scales: fp32, factor of the product and factor of the square before it is rounded; only for fp8.
    """
    tiles_m, tiles_n = rows // BM, hidden // BN
    HALF: tl.constexpr = BN // 2
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS):
        m, n = place_of(tile, tiles_m, tiles_n, GROUP)
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, width, BK):
            acc = tl.dot(x.load([m * BM, k]), w.load([n * BN, k]).T, acc)
        # In halves, that the tiles on their way out take half of the shared memory.
        halves = acc.reshape(BM, 2, HALF).permute(0, 2, 1).split()
        for half in tl.static_range(2):
            r = tl.maximum(halves[half], 0.0, propagate_nan=tl.PropagateNan.ALL)
            at = n * BN + half * HALF
            if EIGHT:
                r *= tl.load(scales)
                eighth = rounded(r * r * tl.load(scales + 1), LARGEST, post.dtype)
                post.store([m * BM, at], eighth)
                columns.store([at, m * BM], eighth.T)
            else:
                post.store([m * BM, at], (r * r).to(post.dtype))


@triton.jit
def down_gradient_kernel(
    g: tl.tensor,
    w: tl.tensor,
    post: tl.tensor,
    out: tl.tensor,
    columns: tl.tensor,
    scales: tl.tensor,
    rows: tl.tensor,
    hidden: tl.tensor,
    width: tl.tensor,
    EIGHT: tl.constexpr,
    LARGEST: tl.constexpr,
    EXACT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
) -> None:
    """(g @ w) * 2 sqrt(post) of g (N, C) -> (N, H), and in fp8 columns (H, N) too.

    w is (C, H) and post (N, H), but in fp8 both are what lies by columns: (H, C) and (H, N). Scales: fp32,
    only for fp8: factor of the product with the root, and factor of the result before it is rounded.
    """
    tiles_m, tiles_n = rows // BM, hidden // BN
    HALF: tl.constexpr = BN // 2
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS):
        m, n = place_of(tile, tiles_m, tiles_n, GROUP)
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, width, BK):
            if EIGHT:
                b = w.load([n * BN, k]).T
                acc = tl.dot(g.load([m * BM, k]), b, acc, max_num_imprecise_acc=EXACT)
            else:
                acc = tl.dot(g.load([m * BM, k]), w.load([k, n * BN]), acc)
        halves = acc.reshape(BM, 2, HALF).permute(0, 2, 1).split()
        for half in tl.static_range(2):
            at = n * BN + half * HALF
            if EIGHT:
                r = tl.sqrt(post.load([at, m * BM]).T.to(tl.float32))
                dz = halves[half] * r * tl.load(scales)
                eighth = rounded(dz * tl.load(scales + 1), LARGEST, out.dtype)
                out.store([m * BM, at], eighth)
                columns.store([at, m * BM], eighth.T)
            else:
                r = tl.sqrt(post.load([m * BM, at]).to(tl.float32))
                out.store([m * BM, at], (halves[half] * (2 * r)).to(out.dtype))


@dataclass(frozen=True)
class Tile:
    """Sides of a tile and of a step, and how many steps are under way.

    Attributes:
        m: rows.
        n: columns.
        k: of a step; 128 bytes.
        stages: steps whose operands are loaded ahead, as many as the 227 KB of shared memory hold.
        exact: products of fp8 that the matrix unit sums before fp32 registers take over; 0 has no limit.
    """

    m: int
    n: int
    k: int
    stages: int
    exact: int = 0


# Two results of 128 registers a thread do not fit: where fp8 is summed exactly, a tile is half as wide.
UP, UP_FP8 = Tile(128, 256, 64, 4), Tile(128, 256, 128, 4)
DOWN, DOWN_FP8 = Tile(128, 256, 64, 4), Tile(128, 128, 128, 5, exact=128)


def up(x: Tensor, w: Tensor, scales: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Launch `up_kernel`: (N, C), (H, C) -> (N, H), and with scales also (H, N), all of one dtype."""
    tile = UP if scales is None else UP_FP8
    (rows, width), hidden = x.shape, w.size(0)
    post = x.new_empty(rows, hidden)
    columns = None if scales is None else x.new_empty(hidden, rows)
    grid = _programs(x, rows // tile.m * (hidden // tile.n))
    up_kernel[(grid,)](
        TensorDescriptor.from_tensor(x, [tile.m, tile.k]),
        TensorDescriptor.from_tensor(w, [tile.n, tile.k]),
        *_results(post, columns, tile),
        scales,
        rows,
        hidden,
        width,
        **_constants(post, scales, tile, grid),
    )
    return post, columns


def down_gradient(
    g: Tensor, w: Tensor, post: Tensor, scales: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Launch `down_gradient_kernel`: (N, C), w, post -> (N, H), and with scales also (H, N)."""
    tile = DOWN if scales is None else DOWN_FP8
    rows, width = g.shape
    hidden = w.size(1) if scales is None else w.size(0)
    out = g.new_empty(rows, hidden)
    columns = None if scales is None else g.new_empty(hidden, rows)
    grid = _programs(g, rows // tile.m * (hidden // tile.n))
    down_gradient_kernel[(grid,)](
        TensorDescriptor.from_tensor(g, [tile.m, tile.k]),
        TensorDescriptor.from_tensor(w, [tile.k, tile.n] if scales is None else [tile.n, tile.k]),
        TensorDescriptor.from_tensor(
            post, [tile.m, tile.n // 2] if scales is None else [tile.n // 2, tile.m]
        ),
        *_results(out, columns, tile),
        scales,
        rows,
        hidden,
        width,
        EXACT=tile.exact,
        **_constants(out, scales, tile, grid),
    )
    return out, columns


def _programs(x: Tensor, tiles: int) -> int:
    """One a multiprocessor; where Triton interprets on a CPU, few."""
    if x.device.type == "cpu":
        return min(tiles, 3)
    return min(tiles, torch.cuda.get_device_properties(x.device).multi_processor_count)


def _results(rows: Tensor, columns: Tensor | None, tile: Tile) -> tuple[Any, Any]:
    half = tile.n // 2
    turned = None if columns is None else TensorDescriptor.from_tensor(columns, [half, tile.m])
    return TensorDescriptor.from_tensor(rows, [tile.m, half]), turned


def _constants(result: Tensor, scales: Tensor | None, tile: Tile, programs: int) -> dict[str, Any]:
    return {
        "EIGHT": scales is not None,
        "LARGEST": torch.finfo(result.dtype).max,
        "BM": tile.m,
        "BN": tile.n,
        "BK": tile.k,
        "GROUP": GROUP,
        "PROGRAMS": programs,
        "num_warps": WARPS,
        "num_stages": tile.stages,
    }
