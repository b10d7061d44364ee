"""Attention by PyTorch's scaled_dot_product_attention, in query chunks where a window is short.

A mask over all pairs of positions would cost T x T time and memory; chunks cost T x window.

Legend: B rows, Tq query positions, Tk key positions, H heads, D head width; W the window: the query at
position p sees the keys j with p - W <= j <= p.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Smallest query chunk where chunks stack into the batch. At window 16, T=512, one CPU core, forward and
# backward: 24 ms with chunks of 16, 17 with 32, 19 with 64, 24 with 128; larger windows set the chunk.
MIN_STACKED_CHUNK = 32
# Least and most queries of a chunk on a CPU, else half a window. Two threads, bf16, forward and backward,
# T=8192, W=512, 4 heads of 128: 0.62 s with chunks of 32 or 64, 0.60 with 128, 0.58 with 256, 0.78 with 512;
# stacked chunks 1.03.
# 16 rows of T=512, W=128, 2 heads: 0.099, 0.104, 0.116, 0.122 s with 32 to 256; stacked 0.122.
CPU_CHUNK = (64, 512)
# Rows of queries a masked call takes behind a cache: bounds its mask to 512 x (window + 512).
CACHED_QUERY_CHUNK = 512


def band_mask(tq: int, tk: int, window: int, device: torch.device) -> Tensor:
    """(tq, tk) bool: True where the query at position tk - tq + i sees key j."""
    position = torch.arange(tk - tq, tk, device=device)[:, None]
    key = torch.arange(tk, device=device)[None, :]
    return (key <= position) & (key >= position - window)


def same_document(documents: Tensor, queries: slice, keys: slice) -> Tensor:
    """(B, 1, Tq, Tk) bool from the numbers of the documents, (B, T)."""
    return documents[:, None, queries, None] == documents[:, None, None, keys]


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None, documents: Tensor | None = None
) -> Tensor:
    """See `attention.attention`; `documents` (B, T) numbers the documents, where Tq = Tk = T."""
    tq, tk = q.size(1), k.size(1)
    first = max(0, tk - tq - window)  # keys before it are out of every query's sight
    if first:
        k, v = k[:, first:], v[:, first:]
        tk -= first
    # Heads are expanded here and not by enable_gqa: with a mask, CUDA has no memory-efficient kernel for it.
    groups = q.size(2) // k.size(2)
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
    if tq == tk and window >= tk - 1 and documents is None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    elif tq == 1:
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    elif tq < tk:
        out = _behind_cache(q, k, v, window, scale)
    elif q.device.type == "cpu":
        out = _ChunksOnCpu.apply(q, k, v, window, scale, documents)
    else:
        out = _stacked_chunks(q, k, v, window, scale, documents)
    return out.transpose(1, 2)


@lru_cache(maxsize=64)
def _cached_mask(tq: int, tk: int, window: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A mask made once a shape; at most (window + chunk) x chunk elements each."""
    with torch.inference_mode(False):  # a mask first met while generating must still serve a later backward
        return _mask_of(band_mask(tq, tk, window, device), dtype)


def _mask_of(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """`visible` itself for bool, else what is added to the scores: 0 where visible, -inf elsewhere."""
    if dtype == torch.bool:
        return visible
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, float("-inf"))


def _mask(tq: int, tk: int, window: int, device: torch.device, dtype: torch.dtype = torch.bool) -> Tensor:
    """The band's mask from the cache; a compiler traces it as it is, and keeps no cache of ours."""
    if torch.compiler.is_compiling():
        return _mask_of(band_mask(tq, tk, window, device), dtype)
    return _cached_mask(tq, tk, window, device, dtype)


class _ChunksOnCpu(torch.autograd.Function):
    """Tq = Tk = T with a window or documents, (B, H, T, D): chunk by chunk, on views.

    A pass holds its inputs, its output and their gradients, and nothing else that grows with T. It calls the
    kernels that scaled_dot_product_attention chooses on a CPU: through the public function each
    chunk would keep a copy of its keys and values, or add up gradients of the length of T.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None, documents: Tensor | None
    ) -> Tensor:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, sums = torch.empty_like(q), []
        for rows, keys in _cpu_chunks(q.size(2), window):
            mask = _chunk_mask(q, rows, keys, window, documents)
            part = q[:, :, rows], k[:, :, keys], v[:, :, keys]
            out[:, :, rows], log_sum = kernel(*part, attn_mask=mask, scale=scale)
            sums.append(log_sum)
        ctx.save_for_backward(q, k, v, out, *sums)
        ctx.window, ctx.scale, ctx.documents = window, scale, documents
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        q, k, v, out, *sums = ctx.saved_tensors
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (rows, keys), log_sum in zip(_cpu_chunks(q.size(2), ctx.window), sums, strict=True):
            mask = _chunk_mask(q, rows, keys, ctx.window, ctx.documents)
            part = grad[:, :, rows], q[:, :, rows], k[:, :, keys], v[:, :, keys], out[:, :, rows], log_sum
            grads = kernel(*part, 0.0, False, attn_mask=mask, scale=ctx.scale)
            grad_q[:, :, rows] = grads[0]
            grad_k[:, :, keys] += grads[1]
            grad_v[:, :, keys] += grads[2]
        return grad_q, grad_k, grad_v, None, None, None


def _cpu_chunks(t: int, window: int) -> list[tuple[slice, slice]]:
    """Query chunks, each with the keys that it sees."""
    n = min(max(window // 2, CPU_CHUNK[0]), CPU_CHUNK[1])
    return [(slice(i, min(t, i + n)), slice(max(0, i - window), min(t, i + n))) for i in range(0, t, n)]


def _chunk_mask(q: Tensor, rows: slice, keys: slice, window: int, documents: Tensor | None) -> Tensor:
    shape = (rows.stop - rows.start, keys.stop - keys.start, window, q.device)
    if documents is None:
        return _mask(*shape, q.dtype)
    return _mask_of(_mask(*shape) & same_document(documents, rows, keys), q.dtype)


def _stacked_chunks(
    q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None, documents: Tensor | None
) -> Tensor:
    """Tq = Tk = T with a window or documents, (B, H, T, D): all chunks but the first in one call.

    A chunk of N >= window queries sees the last `window` keys of the chunk before it and its own N, so every
    chunk has the same (N, window + N) mask and the chunks stack into the batch. Work is T x (window + N)
    instead of T x T.
    """
    b, h, t, d = q.shape
    n = max(window, MIN_STACKED_CHUNK)
    if n >= t:
        mask = _mask(t, t, window, q.device)
        if documents is not None:
            mask = mask & same_document(documents, slice(t), slice(t))
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    pad = -t % n
    if pad:  # keys added at the end come after every real query
        q, k, v = (F.pad(x, (0, 0, 0, pad)) for x in (q, k, v))
        documents = None if documents is None else F.pad(documents, (0, pad))
    chunks = (t + pad) // n
    q, k, v = (x.reshape(b, h, chunks, n, d).transpose(1, 2) for x in (q, k, v))  # (B, chunks, H, N, D)
    first_mask, mask = _mask(n, n, window, q.device), _mask(n, window + n, window, q.device)
    if documents is not None:
        number = documents.reshape(b, chunks, n)
        first_mask = first_mask & same_document(number[:, 0], slice(n), slice(n))
        span = torch.cat((number[:, :-1, n - window :], number[:, 1:]), dim=2).flatten(0, 1)
        mask = mask & same_document(span, slice(window, None), slice(None))
    first = F.scaled_dot_product_attention(q[:, 0], k[:, 0], v[:, 0], first_mask, scale=scale)
    span_k = torch.cat((k[:, :-1, :, n - window :], k[:, 1:]), dim=3).flatten(0, 1)
    span_v = torch.cat((v[:, :-1, :, n - window :], v[:, 1:]), dim=3).flatten(0, 1)
    rest = F.scaled_dot_product_attention(q[:, 1:].flatten(0, 1), span_k, span_v, mask, scale=scale)
    out = torch.cat((first[:, None], rest.reshape(b, chunks - 1, h, n, d)), dim=1)
    return out.transpose(1, 2).reshape(b, h, t + pad, d)[:, :, :t]


def row_mask(lengths: Tensor, tq: int, tk: int, window: int, dtype: torch.dtype) -> Tensor:
    """What is added to the scores of rows that have lengths[b] of tk keys, (B, 1, tq, tk): 0 or -inf.

    Args:
        lengths: (B,) int64, tq or more; the queries of a row are the last of its positions.
        tq: queries of a row.
        tk: keys of every row, of which the first are a row's own.
        window: as in `attention.attention`.
        dtype: of the scores.
    """
    device = lengths.device
    position = lengths[:, None] + torch.arange(-tq, 0, device=device)  # (B, tq)
    behind = position[:, None, :, None] - torch.arange(tk, device=device)
    return _mask_of((behind >= 0) & (behind <= window), dtype)


def sdpa_of_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """Attention of a few new positions behind rows of different lengths, (B, Tq, H, Dv).

    The query heads that read one key head become queries of it: keys and values, of which there is much
    more, are read where they lie.

    Args:
        q: (B, Tq, H, D).
        k: (B, Tk, Hkv, D).
        v: (B, Tk, Hkv, Dv).
        mask: (B, 1, Tq, Tk), as `row_mask` makes it.
        scale: factor on the scores.
    """
    tq, heads = q.size(1), k.size(2)
    groups = q.size(2) // heads
    q = (
        q.view(*q.shape[:2], heads, groups, -1).permute(0, 2, 3, 1, 4).flatten(2, 3)
    )  # (B, Hkv, groups * Tq, D)
    mask = mask.repeat(1, 1, groups, 1) if groups > 1 else mask
    out = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), mask, scale=scale)
    return out.view(*out.shape[:2], groups, tq, -1).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _behind_cache(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None) -> Tensor:
    """1 < Tq < Tk, shapes (B, H, T, D): several new positions behind a cache, in query chunks."""
    tq, tk = q.size(2), k.size(2)
    out = []
    for start in range(0, tq, CACHED_QUERY_CHUNK):
        stop = min(tq, start + CACHED_QUERY_CHUNK)
        low, high = max(0, tk - tq + start - window), tk - tq + stop
        mask = _mask(stop - start, high - low, window, q.device)
        part = (q[:, :, start:stop], k[:, :, low:high], v[:, :, low:high])
        out.append(F.scaled_dot_product_attention(*part, mask, scale=scale))
    return torch.cat(out, dim=2)
