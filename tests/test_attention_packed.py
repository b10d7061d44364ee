"""The calls of the flash kernels, computed exactly on a CPU: windows, widths, documents, gradients.

Only the kernels are replaced, by their documented meaning; torch's own function for packed sequences and its
backward formula run as they are.
"""

import sys
from types import SimpleNamespace

import pytest
import torch

from nanochat.model.attention import Layout, attention, layout_of
from nanochat.model.sdpa_attention import band_mask
from tests.attention_reference import attention_reference
from tests.test_attention import random_qkv, several_documents

varlen = pytest.importorskip("torch.nn.attention.varlen")


def sequences(q, k, starts_q, starts_k, scale, left):
    """Of each sequence that is not empty: its queries and keys as slices, and its weights (H, Tq, Tk)."""
    bounds = (x.tolist() for starts in (starts_q, starts_k) for x in (starts[:-1], starts[1:]))
    for first, last, first_k, last_k in zip(*bounds, strict=True):
        if first < last:
            mine, seen = slice(first, last), slice(first_k, last_k)
            scores = torch.einsum("ihd,jhd->hij", q[mine], k[seen]) * scale
            visible = band_mask(last - first, last_k - first_k, last_k if left < 0 else left, q.device)
            yield mine, seen, scores.masked_fill(~visible, float("-inf")).softmax(-1)


def packed(q, k, v, starts_q, starts_k, scale, left):
    """(N, H, D) queries of sequences that begin where starts_q says; causal, aligned at the last position."""
    k, v = (x.repeat_interleave(q.size(1) // k.size(1), 1) for x in (k, v))
    scale = q.size(-1) ** -0.5 if scale is None else scale
    parts = sequences(q, k, starts_q, starts_k, scale, left)
    return torch.cat([torch.einsum("hij,jhd->ihd", weights, v[seen]) for _, seen, weights in parts])


def torch_forward(q, k, v, starts_q, starts_k, max_q, max_k, causal, scale, window, *rest):
    """What torch's operator for packed sequences gives."""
    assert starts_q.dtype == starts_k.dtype == torch.int32
    assert starts_q.diff().max() <= max_q
    assert window[1] == 0
    out = packed(q, k, v, starts_q, starts_k, scale, window[0])
    return out, torch.zeros(q.size(1), q.size(0)), torch.zeros(2, dtype=torch.uint64)


def torch_backward(
    grad, q, k, v, out, sums, starts_q, starts_k, max_q, max_k, causal, rng, scale, window, *rest
):
    """Its gradients, by the formula: an operator's kernel records no autograd."""
    groups, scale = q.size(1) // k.size(1), q.size(-1) ** -0.5 if scale is None else scale
    wide_k, wide_v = (x.repeat_interleave(groups, 1) for x in (k, v))
    grad_q, grad_k, grad_v = torch.zeros_like(q), torch.zeros_like(wide_k), torch.zeros_like(wide_v)
    for mine, seen, weights in sequences(q, wide_k, starts_q, starts_k, scale, window[0]):
        grad_v[seen] = torch.einsum("hij,ihd->jhd", weights, grad[mine])
        of_weights = torch.einsum("ihd,jhd->hij", grad[mine], wide_v[seen])
        of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True)) * scale
        grad_q[mine] = torch.einsum("hij,jhd->ihd", of_scores, wide_k[seen])
        grad_k[seen] = torch.einsum("hij,ihd->jhd", of_scores, q[mine])
    return grad_q, *(x.unflatten(1, (-1, groups)).sum(2) for x in (grad_k, grad_v))


@pytest.fixture(scope="module", autouse=True)
def _exact_kernels():
    torch.library.register_kernel("torch_attn::_varlen_attn", "cpu", torch_forward)
    torch.library.register_kernel("torch_attn::_varlen_attn_backward", "cpu", torch_backward)


@pytest.fixture(autouse=True)
def _exact_packages(monkeypatch):
    def varlen_func(
        q,
        k,
        v,
        *,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale,
        causal,
        window_size,
    ):
        assert causal
        assert window_size[1] == 0
        assert cu_seqlens_q.diff().max() <= max_seqlen_q
        return packed(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, window_size[0])

    def dense(q, k, v, *, softmax_scale, causal, window_size):
        starts = (torch.arange(0, (len(x) + 1) * x.size(1), x.size(1)) for x in (q, k))
        flat = (x.flatten(0, 1) for x in (q, k, v))
        return packed(*flat, *starts, softmax_scale, window_size[0]).view_as(q)

    package = SimpleNamespace(flash_attn_func=dense, flash_attn_varlen_func=varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package)
    monkeypatch.setitem(sys.modules, "flash_attn", package)


def compare(backend, q, k, v, layout, **options):
    out = attention(q, k, v, backend=backend, layout=layout, **options)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    grads = torch.autograd.grad((out * weights).sum(), (q, k, v))
    exact = [x.detach().requires_grad_() for x in (q, k, v)]
    want = attention_reference(*exact, documents=layout.documents, **options)
    torch.testing.assert_close(out, want)
    for got, expected in zip(grads, torch.autograd.grad((want * weights).sum(), exact), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backend", ["varlen", "fa3", "fa2"])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("window", [0, 5, 38, 39, 100])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_a_packed_call_sees_what_the_reference_sees(backend, documents, window, heads):
    q, k, v = random_qkv(40, 40, h=heads[0], hkv=heads[1], b=3)
    layout = layout_of(several_documents(3, 40), backend, [window]) if documents else Layout()
    compare(backend, q, k, v, layout, window=window)


@pytest.mark.parametrize("backend", ["varlen", "fa3"])
def test_documents_without_a_slot_are_seen_as_the_layout_numbers_them(backend):
    q, k, v = random_qkv(60, 60, h=1, hkv=1, b=3)
    compare(backend, q, k, v, layout_of(torch.ones(3, 60, dtype=torch.bool), backend, [60]), window=60)


@pytest.mark.parametrize("backend", ["varlen", "fa3"])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_values_may_be_wider_than_queries(backend, scale):
    q, k, _ = random_qkv(40, 40)
    v = random_qkv(40, 40, d=16)[2]
    compare(backend, q, k, v, Layout(), window=9, scale=scale)


@pytest.mark.parametrize("backend", ["varlen", "fa3", "fa2"])
@pytest.mark.parametrize(("tq", "tk"), [(1, 40), (7, 40), (39, 40)])
def test_behind_a_cache_a_query_sees_the_last_positions(backend, tq, tk):
    compare(backend, *random_qkv(tq, tk), Layout(), window=9)
    compare(backend, *random_qkv(tq, tk), Layout(), window=tk)


@pytest.mark.parametrize("width", [12, 264])
def test_a_width_that_no_flash_kernel_takes_is_left_to_sdpa(width, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    compare("fa2", *random_qkv(20, 20, d=width), Layout(), window=9)
