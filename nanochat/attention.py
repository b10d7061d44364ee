"""Causal sliding-window attention: one function, four backends, and the plain mathematics.

Legend: B rows, Tq query positions, Tk key positions (Tk >= Tq), H query heads, Hkv key/value heads, D head
width. Query i stands at absolute position p = Tk - Tq + i and sees the keys j with p - window <= j <= p, so a
window of 0 is the position itself, and Tq < Tk is decoding behind a cache. H is a multiple of Hkv; head h
reads K/V head h // (H / Hkv).

Backends: "fa3" (flash_attn_interface, Hopper), "fa2" (flash_attn, Ampere and later), "flex" (PyTorch
FlexAttention with a block mask, any CUDA GPU), "sdpa" (PyTorch; windows by blocks of queries, so time and
memory follow the window).
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.errors import UserError
from nanochat.hardware import Precision, choose_dtype

BACKENDS = ("fa3", "fa2", "flex", "sdpa")
# Smallest block of queries of the windowed sdpa. At window 16, T=512, one CPU core, forward and backward:
# 24 ms with blocks of 16, 17 with 32, 19 with 64, 24 with 128; larger windows set the block themselves.
MIN_QUERY_BLOCK = 32
# Rows of queries a masked call takes behind a cache: bounds its mask to 512 x (window + 512).
CACHED_QUERY_BLOCK = 512


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int, backend: str, scale: float | None = None
) -> Tensor:
    """Causal attention over the last `window` positions and the position itself.

    Args:
        q: (B, Tq, H, D) queries, at the last Tq of the Tk positions.
        k: (B, Tk, Hkv, D) keys.
        v: (B, Tk, Hkv, D) values.
        window: how many previous positions a query sees besides its own; Tk - 1 or more is full attention.
        backend: one of BACKENDS, as chosen by choose_backend.
        scale: factor on the scores before the softmax; by default D ** -0.5.

    Returns:
        (B, Tq, H, D) in the dtype of q.
    """
    assert k.size(1) >= q.size(1)
    assert q.size(2) % k.size(2) == 0
    assert window >= 0
    if backend == "sdpa":
        return _sdpa(q, k, v, window, scale)
    if backend == "flex":
        return _flex(q, k, v, window, scale)
    if backend == "fa3":
        return _flash("flash_attn_interface", q, k, v, window, scale)
    assert backend == "fa2", backend
    return _flash("flash_attn", q, k, v, window, scale)


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *, window: int, scale: float | None = None
) -> Tensor:
    """The definition, in plain mathematics and with an explicit mask; shapes as in `attention`."""
    groups = q.size(2) // k.size(2)
    k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (q.size(-1) ** -0.5 if scale is None else scale)
    visible = band_mask(q.size(1), k.size(1), window, q.device)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def band_mask(tq: int, tk: int, window: int, device: torch.device) -> Tensor:
    """(tq, tk) bool: True where the query at position tk - tq + i sees key j."""
    position = torch.arange(tk - tq, tk, device=device)[:, None]
    key = torch.arange(tk, device=device)[None, :]
    return (key <= position) & (key >= position - window)


# ----------------------------------------------------------------------------------------------------
# sdpa


def _mask(tq: int, tk: int, window: int, device: torch.device) -> Tensor:
    """band_mask from the cache; a compiler traces it as it is, and keeps no cache of ours."""
    return (band_mask if torch.compiler.is_compiling() else _cached_mask)(tq, tk, window, device)


@lru_cache(maxsize=32)
def _cached_mask(tq: int, tk: int, window: int, device: torch.device) -> Tensor:
    """band_mask made once a shape; at most (window + block) x block elements each."""
    with torch.inference_mode(False):  # a mask first met while generating must still serve a later backward
        return band_mask(tq, tk, window, device)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None) -> Tensor:
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
    if tq == tk and window >= tk - 1:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    elif tq == 1:
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    elif tq == tk:
        out = _sdpa_banded(q, k, v, window, scale)
    else:
        out = _sdpa_cached(q, k, v, window, scale)
    return out.transpose(1, 2)


def _sdpa_banded(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None) -> Tensor:
    """Tq = Tk = T and window < T - 1, with shapes (B, H, T, D): all blocks but the first in one call.

    A block of N >= window queries sees the last `window` keys of the block before it and its own N, so every
    block has the same (N, window + N) mask and the blocks stack into the batch. Work is T x (window + N)
    instead of T x T.
    """
    b, h, t, d = q.shape
    n = max(window, MIN_QUERY_BLOCK)
    if n >= t:
        return F.scaled_dot_product_attention(q, k, v, _mask(t, t, window, q.device), scale=scale)
    pad = -t % n
    if pad:  # keys added at the end come after every real query
        q, k, v = (F.pad(x, (0, 0, 0, pad)) for x in (q, k, v))
    blocks = (t + pad) // n
    q, k, v = (x.reshape(b, h, blocks, n, d).transpose(1, 2) for x in (q, k, v))  # (B, blocks, H, N, D)
    mask = _mask(n, n, window, q.device)
    first = F.scaled_dot_product_attention(q[:, 0], k[:, 0], v[:, 0], mask, scale=scale)
    span_k = torch.cat((k[:, :-1, :, n - window :], k[:, 1:]), dim=3).flatten(0, 1)
    span_v = torch.cat((v[:, :-1, :, n - window :], v[:, 1:]), dim=3).flatten(0, 1)
    mask = _mask(n, window + n, window, q.device)
    rest = F.scaled_dot_product_attention(q[:, 1:].flatten(0, 1), span_k, span_v, mask, scale=scale)
    out = torch.cat((first[:, None], rest.reshape(b, blocks - 1, h, n, d)), dim=1)
    return out.transpose(1, 2).reshape(b, h, t + pad, d)[:, :, :t]


def _sdpa_cached(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None) -> Tensor:
    """1 < Tq < Tk, shapes (B, H, T, D): several new positions behind a cache, in blocks of queries."""
    tq, tk = q.size(2), k.size(2)
    out = []
    for start in range(0, tq, CACHED_QUERY_BLOCK):
        stop = min(tq, start + CACHED_QUERY_BLOCK)
        low, high = max(0, tk - tq + start - window), tk - tq + stop
        mask = _mask(stop - start, high - low, window, q.device)
        part = (q[:, :, start:stop], k[:, :, low:high], v[:, :, low:high])
        out.append(F.scaled_dot_product_attention(*part, mask, scale=scale))
    return torch.cat(out, dim=2)


# ----------------------------------------------------------------------------------------------------
# flex and flash


@lru_cache(maxsize=32)
def _block_mask(tq: int, tk: int, window: int, device: torch.device) -> Any:
    """FlexAttention's block-sparse form of band_mask, made once a shape."""
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        position = i + (tk - tq)
        return (j <= position) & (j >= position - window)

    with torch.inference_mode(False):
        return create_block_mask(visible, None, None, tq, tk, device=str(device))


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Any]:
    """FlexAttention is only block-sparse when compiled; eager, it is the dense formula."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None) -> Tensor:
    mask = _block_mask(q.size(1), k.size(1), window, q.device)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out: Tensor = _compiled_flex()(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.size(1) != k.size(1))
    return out.transpose(1, 2)


def _flash(module: str, q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None) -> Tensor:
    """Both packages align the causal mask at the bottom right and take (left, right), -1 for no limit."""
    left = window if window < k.size(1) - 1 else -1
    flash_attn_func = importlib.import_module(module).flash_attn_func
    out = flash_attn_func(q, k, v, softmax_scale=scale, causal=True, window_size=(left, 0))
    result: Tensor = out[0] if isinstance(out, tuple) else out  # early fa3 releases return (out, logsumexp)
    return result


# ----------------------------------------------------------------------------------------------------
# choice


def available_backends(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> dict[str, str]:
    """For each backend, why it cannot run here, or "" if it can."""
    reasons = dict.fromkeys(BACKENDS, "")
    if device.type != "cuda":
        missing = f"needs a CUDA GPU, the device is {device.type}"
        return reasons | {"fa3": missing, "fa2": missing, "flex": missing}
    major, minor = torch.cuda.get_device_capability(device)
    arch = f"sm{major}{minor}"
    if dtype not in (torch.bfloat16, torch.float16):
        reasons["fa3"] = reasons["fa2"] = f"needs bf16 or fp16, the compute dtype is {dtype}"
    elif major != 9:
        reasons["fa3"] = f"needs a Hopper GPU (sm90), this is {arch}"
    elif importlib.util.find_spec("flash_attn_interface") is None:
        reasons["fa3"] = "the package flash_attn_interface is not installed"
    if not reasons["fa2"] and major < 8:
        reasons["fa2"] = f"needs an Ampere GPU (sm80) or later, this is {arch}"
    elif not reasons["fa2"] and importlib.util.find_spec("flash_attn") is None:
        reasons["fa2"] = "the package flash_attn is not installed"
    if major < 7:
        reasons["flex"] = f"needs sm70 or later for Triton, this is {arch}"
    elif importlib.util.find_spec("triton") is None:
        reasons["flex"] = "the package triton is not installed"
    return reasons


def choose_backend(
    device: torch.device, requested: str = "auto", dtype: torch.dtype = torch.bfloat16
) -> tuple[str, str]:
    """The backend to use and the reason, for printing once.

    Args:
        device: where the model runs.
        requested: "auto" or one of BACKENDS.
        dtype: the compute dtype; the flash packages take bf16 and fp16 only.

    Raises:
        UserError: the name is unknown, or that backend cannot run here.
    """
    if requested not in ("auto", *BACKENDS):
        raise UserError(
            f"--attention={requested}: no such backend, expected auto or one of {', '.join(BACKENDS)}. "
            "Use --attention=auto."
        )
    reasons = available_backends(device, dtype)
    if requested != "auto":
        if reasons[requested]:
            raise UserError(
                f"--attention={requested}: not available here: {reasons[requested]}. "
                "Install what is missing or use --attention=auto."
            )
        return requested, "as asked"
    name = next(name for name in BACKENDS if not reasons[name])
    passed_over = [f"{other}: {reasons[other]}" for other in BACKENDS[: BACKENDS.index(name)]]
    return name, "; ".join(passed_over) or "the fastest for this GPU"


def choose_precision(
    device: torch.device, dtype: str = "auto", backend: str = "auto"
) -> tuple[Precision, str]:
    """How a model computes on a device, and a line that says why.

    Args:
        device: where the model runs.
        dtype: what --dtype asks for.
        backend: what --attention asks for.

    Raises:
        UserError: one of them is unknown, or cannot be had here.
    """
    compute_dtype, dtype_reason = choose_dtype(device, dtype)
    name, reason = choose_backend(device, backend, compute_dtype)
    line = f"computing in {compute_dtype} ({dtype_reason}), attention by {name} ({reason})"
    return Precision(compute_dtype, name), line
