"""The interface of FlashAttention 3, with kernels that only give shapes: for graphs, never for numbers.

They are operators that no compiler looks into, as the package's own are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("pretended_fa3::forward", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor | None, starts_k: Tensor | None, left: int
) -> tuple[Tensor, Tensor]:
    """Output, and the logarithms of the sums of exponentials: (tokens, H) fp32; neither is computed."""
    return torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor | None, starts_k: Tensor | None, left: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("pretended_fa3::backward", mutates_args=())
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sums: Tensor,
    starts_q: Tensor | None,
    starts_k: Tensor | None,
    left: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, which are not computed."""
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sums: Tensor,
    starts_q: Tensor | None,
    starts_k: Tensor | None,
    left: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        starts_q: Tensor | None,
        starts_k: Tensor | None,
        left: int,
    ) -> Tensor:
        out, sums = _forward(q, k, v, starts_q, starts_k, left)
        ctx.save_for_backward(q, k, v, out, sums, starts_q, starts_k)
        ctx.left = left
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, out, sums, starts_q, starts_k = ctx.saved_tensors
        return *_backward(grad, q, k, v, out, sums, starts_q, starts_k, ctx.left), None, None, None


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """(B, T, H, D) queries, (B, T, Hkv, D) keys and values -> (B, T, H, D)."""
    return _Attention.apply(q, k, v, None, None, window_size[0])  # type: ignore[no-any-return]


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """(tokens, H, D) queries of sequences that begin where cu_seqlens_q says -> (tokens, H, D)."""
    return _Attention.apply(q, k, v, cu_seqlens_q, cu_seqlens_k, window_size[0])  # type: ignore[no-any-return]


@torch.library.custom_op("pretended_fa3::behind_cache", mutates_args=())
def _behind_cache(q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, left: int) -> Tensor:
    """Output, which is not computed."""
    return torch.empty_like(q)


@_behind_cache.register_fake
def _(q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, left: int) -> Tensor:
    assert cache_seqlens.dtype == torch.int32
    assert cache_seqlens.shape == q.shape[:1] == k_cache.shape[:1] == v_cache.shape[:1]
    assert k_cache.stride(-1) == v_cache.stride(-1) == 1
    return torch.empty_like(q)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """(B, T, H, D) queries, the last of cache_seqlens (B,) of the (B, K, Hkv, D) keys -> (B, T, H, D)."""
    return _behind_cache(q, k_cache, v_cache, cache_seqlens, window_size[0])  # type: ignore[no-any-return]
