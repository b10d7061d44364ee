"""The chunked head and loss against the textbook formula in float64."""

import pytest
import torch
import torch.nn.functional as F

import nanochat.model.loss
from nanochat.model.loss import softcapped_cross_entropy, token_losses

SOFTCAP = 15.0


def textbook(x, weight, targets, reduction="mean", vocab_size=None, softcap=SOFTCAP):
    z = x.double() @ weight.double()[:vocab_size].t()
    return F.cross_entropy(softcap * torch.tanh(z / softcap), targets, ignore_index=-1, reduction=reduction)


def problem(n=50, c=16, v=70, dtype=torch.float32, scale=3.0, seed=0):
    """Logits of both signs, some far into the cap; a tenth of the targets does not count."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, c, generator=g).to(dtype).requires_grad_()
    weight = (torch.randn(v, c, generator=g) * scale).requires_grad_()
    targets = torch.randint(0, v - 6, (n,), generator=g)
    targets[::10] = -1
    return x, weight, targets


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("chunk_rows", [1, 7, 50, 1000, None])
def test_loss_and_gradients_equal_float64(reduction, chunk_rows):
    x, weight, targets = problem()
    loss = softcapped_cross_entropy(x, weight, targets, SOFTCAP, reduction=reduction, chunk_rows=chunk_rows)
    grads = torch.autograd.grad(loss, (x, weight))
    exact = [p.detach().double().requires_grad_() for p in (x, weight)]
    want = textbook(*exact, targets, reduction)
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
    for got, expected in zip(grads, torch.autograd.grad(want, exact), strict=True):
        assert (got.double() - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_small_tiles_of_a_chunk_change_nothing(monkeypatch):
    x, weight, targets = problem()
    want = torch.autograd.grad(softcapped_cross_entropy(x, weight, targets, SOFTCAP), (x, weight))
    monkeypatch.setitem(nanochat.model.loss.TILE_ELEMENTS, "cpu", 3 * 70)
    got = torch.autograd.grad(softcapped_cross_entropy(x, weight, targets, SOFTCAP), (x, weight))
    torch.testing.assert_close(got, want)


def test_in_float64_it_is_the_textbook_formula():
    x, weight, targets = problem(n=6, c=3, v=9)
    exact = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    loss = softcapped_cross_entropy(*exact, targets, SOFTCAP, chunk_rows=4)
    want = textbook(*exact, targets)
    torch.testing.assert_close(loss, want, rtol=1e-13, atol=0)
    grads = torch.autograd.grad(loss, exact)
    torch.testing.assert_close(grads, torch.autograd.grad(want, exact), rtol=1e-11, atol=1e-13)


def test_a_second_backward_is_refused():
    x, weight, targets = problem()
    loss = softcapped_cross_entropy(x, weight, targets, SOFTCAP)
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="backward called twice"):
        loss.backward()


def test_the_gradient_of_what_follows_is_passed_on():
    x, weight, targets = problem()
    plain = torch.autograd.grad(softcapped_cross_entropy(x, weight, targets, SOFTCAP), (x, weight))
    scaled = torch.autograd.grad(softcapped_cross_entropy(x, weight, targets, SOFTCAP) * 3, (x, weight))
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(3 * a, b)


def test_bf16_is_within_its_rounding():
    x, weight, targets = problem(n=200, c=64, v=300, dtype=torch.bfloat16, scale=0.3)
    loss = softcapped_cross_entropy(x, weight, targets, SOFTCAP, chunk_rows=64)
    grads = torch.autograd.grad(loss, (x, weight))
    assert loss.dtype == torch.float32
    assert (grads[0].dtype, grads[1].dtype) == (torch.bfloat16, torch.float32)
    exact = [p.detach().double().requires_grad_() for p in (x, weight)]
    want = textbook(*exact, targets)
    assert abs(loss.item() - want.item()) < 2e-3 * want.item()
    for got, expected in zip(grads, torch.autograd.grad(want, exact), strict=True):
        assert (got.double() - expected).norm() < 0.01 * expected.norm()


def test_padded_rows_take_no_part():
    x, weight, targets = problem()
    loss = softcapped_cross_entropy(x, weight, targets, SOFTCAP, vocab_size=64)
    grad_x, grad_weight = torch.autograd.grad(loss, (x, weight))
    torch.testing.assert_close(loss.double(), textbook(x, weight, targets, vocab_size=64), rtol=1e-6, atol=0)
    assert torch.equal(grad_weight[64:], torch.zeros(6, 16))
    with torch.no_grad():
        weight[64:] = float("nan")
    again = softcapped_cross_entropy(x, weight, targets, SOFTCAP, vocab_size=64)
    assert torch.equal(torch.autograd.grad(again, x)[0], grad_x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_is_cast_already_changes_nothing(dtype):
    x, weight, targets = problem(dtype=dtype)
    cast = weight.detach().to(dtype)
    answers = []
    for given in (None, cast):
        loss = softcapped_cross_entropy(x, weight, targets, SOFTCAP, vocab_size=64, cast=given)
        losses = token_losses(x, weight, targets, SOFTCAP, 64, cast=given)
        answers.append((loss, *torch.autograd.grad(loss, (x, weight)), *losses))
    for plain, given in zip(*answers, strict=True):
        assert torch.equal(plain, given)
    assert answers[1][2].dtype == torch.float32  # the gradient is the master's


def test_without_any_target_the_loss_and_gradients_are_zero():
    x, weight, _ = problem()
    loss = softcapped_cross_entropy(x, weight, torch.full((50,), -1), SOFTCAP)
    loss.backward()
    assert loss.item() == 0
    assert not x.grad.any()
    assert not weight.grad.any()


def test_no_row_that_is_ignored_reaches_a_gradient():
    x, weight, targets = problem()
    with torch.no_grad():
        x[targets == -1] = 1e3
    loss = softcapped_cross_entropy(x, weight, targets, SOFTCAP)
    grad_x, grad_weight = torch.autograd.grad(loss, (x, weight))
    kept = targets != -1
    part = x.detach()[kept].requires_grad_()
    want = torch.autograd.grad(softcapped_cross_entropy(part, weight, targets[kept], SOFTCAP), (part, weight))
    torch.testing.assert_close(grad_x[kept], want[0])
    torch.testing.assert_close(grad_weight, want[1])
    assert not grad_x[~kept].any()


def test_token_losses_and_the_likeliest_token():
    x, weight, targets = problem()
    best = (x @ weight.t()).argmax(-1)
    targets[1:30:2] = best[1:30:2]
    losses, is_argmax = token_losses(x, weight, targets, SOFTCAP, chunk_rows=9)
    torch.testing.assert_close(
        losses.double(), textbook(x, weight, targets, "none").detach(), rtol=2e-6, atol=1e-6
    )
    assert torch.equal(is_argmax, (best == targets) & (targets != -1))
    assert is_argmax.any()
    with torch.no_grad():
        none = softcapped_cross_entropy(x, weight, targets, SOFTCAP, reduction="none", chunk_rows=9)
        mean = softcapped_cross_entropy(x, weight, targets, SOFTCAP)
    assert torch.equal(none, losses)
    torch.testing.assert_close(mean, losses.sum() / (targets != -1).sum())


def test_an_extreme_logit_stays_finite_and_exact():
    """All mass on a wrong token: the loss is at most 2 softcap + log V."""
    x = torch.tensor([[1e4]], requires_grad=True)
    weight = torch.tensor([[-1.0], [1.0], [1.0]], requires_grad=True)
    loss = softcapped_cross_entropy(x, weight, torch.tensor([0]), SOFTCAP)
    loss.backward()
    assert abs(loss.item() - (2 * SOFTCAP + torch.log(torch.tensor(2.0)).item())) < 1e-4
    assert torch.isfinite(x.grad).all()


def test_no_tensor_holds_all_logits():
    """The largest allocation of a pass stays within the chunk, forward and backward."""
    n, c, v, chunk = 512, 8, 256, 32
    x, weight, targets = problem(n=n, c=c, v=v)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.untyped_storage().nbytes() // out.element_size())
            return out

    with Watch():
        softcapped_cross_entropy(x, weight, targets, SOFTCAP, chunk_rows=chunk).backward()
    assert 0 < largest <= max(chunk * v, n * c)


def test_fp16_keeps_the_small_derivatives():
    """With a large vocabulary most derivatives by the logits would be below fp16's full precision."""
    x, weight, targets = problem(n=64, c=16, v=20_000, dtype=torch.float16, scale=0.3)
    loss = softcapped_cross_entropy(x, weight, targets, SOFTCAP)
    (loss * 2.0**10).backward()
    exact = [p.detach().double().requires_grad_() for p in (x, weight)]
    want = textbook(*exact, targets)
    assert abs(loss.item() - want.item()) < 1e-3 * want.item()
    for got, expected in zip((x.grad, weight.grad), torch.autograd.grad(want, exact), strict=True):
        assert (got.double() / 2**10 - expected).norm() < 0.002 * expected.norm()
    rare = [i for i in range(20_000) if i not in set(targets.tolist())]
    (_, expected) = torch.autograd.grad(textbook(*exact, targets), exact)
    error = (weight.grad[rare].double() / 2**10 - expected[rare]).norm()
    assert error < 0.002 * expected[rare].norm()
