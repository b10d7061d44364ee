"""The weighted loss against the textbook formula, and against the mean of means that it replaces."""

import pytest
import torch

from nanochat.common.machine import Precision
from nanochat.model.loss import softcapped_cross_entropy
from tests.test_gpt import config_of, random_model
from tests.test_loss import SOFTCAP, problem, textbook


def signed_weights(targets, seed=5):
    """Of both signs and very different sizes, a third zero; of ignored targets what must never be read."""
    g = torch.Generator().manual_seed(seed)
    weights = torch.randn(targets.shape, generator=g) * torch.randn(targets.shape, generator=g).exp()
    weights[1::3] = 0
    weights[targets == -1] = torch.nan
    return weights


def plain(x, weight, targets, weights, vocab_size=None):
    """Sum of weight times loss, in float64."""
    each = textbook(x, weight, targets, "none", vocab_size)
    return (each * weights.double().masked_fill(targets == -1, 0)).sum()


@pytest.mark.parametrize("chunk_rows", [1, 7, None])
@pytest.mark.parametrize("scale", [1e-12, 1.0])
def test_loss_and_gradients_equal_the_formula(chunk_rows, scale):
    x, weight, targets = problem()
    weights = signed_weights(targets) * scale
    options = {"vocab_size": 66, "chunk_rows": chunk_rows, "weights": weights}
    loss = softcapped_cross_entropy(x, weight, targets, SOFTCAP, **options)
    with torch.no_grad():
        same = softcapped_cross_entropy(x, weight, targets, SOFTCAP, reduction="sum", **options)
    exact = [p.detach().double().requires_grad_() for p in (x, weight)]
    want, size = (plain(*exact, targets, w, 66) for w in (weights, weights.abs()))
    for got in (loss, same):
        assert abs(got - want) <= 1e-6 * size  # terms of both signs cancel
    grads = torch.autograd.grad(loss, (x, weight)), torch.autograd.grad(want, exact)
    for got, expected in zip(*grads, strict=True):
        assert (got.double() - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert not grads[0][0][targets == -1].any()
    assert not grads[0][0][weights == 0].any()


def test_weights_of_the_mean_are_the_mean():
    x, weight, targets = problem()
    mean = softcapped_cross_entropy(x, weight, targets, SOFTCAP)
    counts = (targets != -1).float()
    loss = softcapped_cross_entropy(x, weight, targets, SOFTCAP, weights=counts / counts.sum())
    torch.testing.assert_close(loss, mean, rtol=1e-6, atol=0)
    pairs = zip(*(torch.autograd.grad(it, (x, weight)) for it in (loss, mean)), strict=True)
    for got, want in pairs:
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("sign", [0.0, -0.0])
def test_without_any_weight_the_loss_and_gradients_are_zero(sign):
    x, weight, targets = problem()
    loss = softcapped_cross_entropy(x, weight, targets, SOFTCAP, weights=torch.full((50,), sign))
    (3 * loss).backward()
    assert loss.item() == 0
    assert not x.grad.any()
    assert not weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_small_weight_costs_no_precision(dtype):
    """One part in 10^6 tokens: as the gradients of the sum, times it; scaled up as fp16 is trained."""
    x, weight, targets = problem(n=64, c=16, v=20_000, dtype=dtype, scale=0.3)
    total = softcapped_cross_entropy(x, weight, targets, SOFTCAP, reduction="sum")
    loss = softcapped_cross_entropy(x, weight, targets, SOFTCAP, weights=torch.full((64,), 1e-6))
    wanted = torch.autograd.grad(total, (x, weight))
    got = torch.autograd.grad(loss * 2.0**14, (x, weight))
    torch.testing.assert_close(loss, total * 1e-6, rtol=1e-6, atol=0)
    torch.testing.assert_close(got[1], wanted[1] * (1e-6 * 2.0**14), rtol=1e-6, atol=0)
    off = (got[0].double() - wanted[0].double() * (1e-6 * 2.0**14)).abs()
    assert (off <= 2 * torch.finfo(dtype).eps * got[0].double().abs() + 1e-6).all()  # rounded once more


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_signed_weights_in_half_precision_are_within_its_rounding(dtype):
    x, weight, targets = problem(n=200, c=64, v=300, dtype=dtype, scale=0.3)
    weights = signed_weights(targets)
    loss = softcapped_cross_entropy(x, weight, targets, SOFTCAP, chunk_rows=64, weights=weights)
    exact = [p.detach().double().requires_grad_() for p in (x, weight)]
    grads = [torch.autograd.grad(loss, (x, weight))]
    grads += [torch.autograd.grad(plain(*exact, targets, weights), exact)]
    for got, expected in zip(*grads, strict=True):
        assert (got.double() - expected).norm() < 0.01 * expected.norm()


def sparse_batch(config):
    """Eight rows; of some nearly all targets count, of others a few, as in conversations."""
    g = torch.Generator().manual_seed(0)
    ids, targets = torch.randint(0, config.vocab_size, (2, 8, config.sequence_len), generator=g)
    shares = torch.tensor([0.9, 0.05, 0.5, 0.1, 0.02, 0.8, 0.3, 0.03])
    targets[torch.rand(targets.shape, generator=g) > shares[:, None]] = -1
    return ids, targets


def gradient(model, ids, targets, rows, weighted):
    """All gradients as one vector, from micro-batches of so many rows, and the loss."""
    model.zero_grad()
    counts, total = targets != -1, 0.0
    parts = [slice(i, i + rows) for i in range(0, len(ids), rows)]
    for part in parts:
        if weighted:
            loss = model.loss(ids[part], targets[part], weights=counts[part] / counts.sum())
        else:
            loss = model.loss(ids[part], targets[part]) / len(parts)
        loss.backward()
        total += loss.item()
    return torch.cat([p.grad.double().flatten() for p in model.parameters()]), total


def test_the_micro_batch_does_not_change_the_gradient_where_means_of_means_do():
    """To 1e-6. Means of means of 1, 2 and 4 rows are off by 180 %, 38 % and 8 % of the gradient's norm."""
    model = random_model(config_of())
    ids, targets = sparse_batch(model.config)
    want, want_loss = gradient(model, ids, targets, 8, weighted=True)
    for rows in (1, 2, 4, 8):
        got, loss = gradient(model, ids, targets, rows, weighted=True)
        assert (got - want).norm() < 1e-6 * want.norm()
        assert abs(loss - want_loss) < 1e-6 * want_loss
    off = []
    for rows in (1, 2, 4, 8):
        got, loss = gradient(model, ids, targets, rows, weighted=False)
        off.append(((got - want).norm() / want.norm()).item())
    assert off[0] > 1.5
    assert off[1] > 0.3
    assert off[2] > 0.05
    assert off[3] < 1e-6


def test_a_negative_weight_makes_a_token_less_likely():
    model = random_model(config_of(n_layer=1), Precision(torch.float32, "sdpa"))
    ids, targets = sparse_batch(model.config)
    targets[:, -1] = 7
    weights = torch.zeros(targets.shape)
    weights[:, -1] = torch.tensor([1.0, -1.0] * 4)

    def losses():
        with torch.no_grad():
            return model.loss(ids, targets, reduction="none")[:, -1]

    before = losses()
    model.loss(ids, targets, weights=weights).backward()
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(p.grad * (1e-3 / sum(q.grad.norm() ** 2 for q in model.parameters()).sqrt()))
    rewarded, punished = (losses() - before).view(4, 2).sum(0)
    assert rewarded < 0 < punished
