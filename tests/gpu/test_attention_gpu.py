"""Every backend that this GPU has against the reference: forward, backward, window, cache."""

import pytest
import torch
import torch._dynamo

from nanochat.model.attention import BACKENDS, PACKED, attention, layout_of
from nanochat.model.attention_backends import available_backends, choose_backend
from tests.attention_reference import attention_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


def backend_or_skip(name):
    reason = available_backends(torch.device("cuda"))[name]
    if reason:
        pytest.skip(f"{name}: {reason}")
    return name


def attend(name, *inputs, **options):
    """By a backend of this GPU; by flex compiled, as outside of a compiled pass it is sdpa."""
    function = torch.compile(attention, dynamic=False) if backend_or_skip(name) == "flex" else attention
    torch._dynamo.reset()
    return function(*inputs, backend=name, **options)


def qkv(tq, tk):
    g = torch.Generator("cuda").manual_seed(0)
    shapes = (2, tq, 4, 64), (2, tk, 2, 64), (2, tk, 2, 64)
    return [torch.randn(s, generator=g, device="cuda", dtype=torch.bfloat16).requires_grad_() for s in shapes]


@pytest.mark.parametrize("window", [0, 100, 128, 5000])
@pytest.mark.parametrize("t", [128, 384, 1000])
@pytest.mark.parametrize("name", BACKENDS)
def test_forward_and_backward_equal_the_reference(name, t, window):
    q, k, v = qkv(t, t)
    out = attend(name, q, k, v, window=window)
    weights = torch.randn_like(out)
    grads = torch.autograd.grad((out * weights).sum(), (q, k, v))
    exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
    want = attention_reference(*exact, window=window)
    want_grads = torch.autograd.grad((want * weights).sum(), exact)
    torch.testing.assert_close(out.float(), want, rtol=0.03, atol=0.03)
    for got, expected in zip(grads, want_grads, strict=True):
        error = (got.float() - expected).norm() / expected.norm()
        assert error < 0.02


@pytest.mark.parametrize("window", [0, 64, 5000])
@pytest.mark.parametrize("tq", [1, 7, 130])
@pytest.mark.parametrize("name", BACKENDS)
def test_behind_a_cache_each_backend_sees_the_last_positions(name, tq, window):
    q, k, v = (x.detach() for x in qkv(tq, 300))
    out = attend(name, q, k, v, window=window)
    want = attention_reference(q.float(), k.float(), v.float(), window=window)
    torch.testing.assert_close(out.float(), want, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("window", [100, 5000])
@pytest.mark.parametrize("name", BACKENDS)
def test_values_twice_as_wide_as_queries(name, window):
    q, k, _ = qkv(384, 384)
    v = torch.randn(2, 384, 2, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    out = attend(name, q, k, v, window=window)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
    want = attention_reference(*exact, window=window)
    want_grads = torch.autograd.grad(want.square().sum(), exact)
    torch.testing.assert_close(out.float(), want, rtol=0.03, atol=0.03)
    for got, expected in zip(grads, want_grads, strict=True):
        assert (got.float() - expected).norm() / expected.norm() < 0.02


@pytest.mark.parametrize("length", [3, 40, 128, 700])
@pytest.mark.parametrize("window", [100, 5000])
@pytest.mark.parametrize("name", PACKED)
def test_documents_of_any_length_and_empty_slots(name, window, length):
    """The shortest have no slots for all, and are seen as the layout then numbers them."""
    q, k, v = qkv(1400, 1400)
    begins = (torch.arange(1400, device="cuda") % length == 0).repeat(2, 1)
    layout = layout_of(begins, backend_or_skip(name), [window])
    out = attend(name, q, k, v, window=window, layout=layout)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
    want = attention_reference(*exact, window=window, documents=layout.documents)
    want_grads = torch.autograd.grad(want.square().sum(), exact)
    torch.testing.assert_close(out.float(), want, rtol=0.03, atol=0.03)
    for got, expected in zip(grads, want_grads, strict=True):
        assert (got.float() - expected).norm() / expected.norm() < 0.02


def test_the_chosen_backend_is_the_first_that_runs_and_says_why():
    name, reason = choose_backend(torch.device("cuda"))
    print(f"attention by {name} ({reason})")
    assert available_backends(torch.device("cuda"))[name] == ""
    if torch.cuda.get_device_capability() >= (8, 0):
        assert name in PACKED, reason
