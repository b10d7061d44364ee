"""The loss on a pretended H100, for its bytes and kernels, and by Triton's interpreter, for its numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nanochat.model import loss
from nanochat.model.fp8 import quantize_weight
from nanochat.model.layers import norm
from tests.gpuless.eager import Counter
from tests.gpuless.probes import Watch

GPU = torch.device("cuda:0")
SOFTCAP = 15.0
PRODUCTS = ("aten.mm", "aten.addmm", "aten._scaled_mm")


def traffics(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`traffic` of several cases in one process."""
    return [traffic(**case) for case in cases]


def traffic(
    tokens: int,
    vocabulary: int,
    padded: int,
    width: int,
    kernel: bool = True,
    grad: bool = True,
    fp8: bool = False,
    weighted: bool = False,
) -> dict[str, Any]:
    """Bytes a logit and kernels of a micro-batch's loss in bf16, of the elementwise part and of products.

    Args:
        tokens: of the micro-batch.
        vocabulary: its size.
        padded: rows of the head.
        width: of the model.
        kernel: False for the path of devices that Triton does not compile for.
        grad: False for evaluation, with the likeliest token.
        fp8: of the head's products.
        weighted: by weights of the tokens.
    """
    loss._is_fused = lambda x: kernel  # type: ignore[assignment]
    with FakeTensorMode():
        x = torch.empty(tokens, width, dtype=torch.bfloat16, device=GPU, requires_grad=grad)
        weight = torch.empty(padded, width, device=GPU, requires_grad=True)
        cast = torch.empty(padded, width, dtype=torch.bfloat16, device=GPU)
        targets = torch.zeros(tokens, dtype=torch.int64, device=GPU)
        crossings = Watch()
        with Counter() as counter, crossings:
            if grad:
                given = {
                    "vocab_size": vocabulary,
                    "cast": cast,
                    "eighth": quantize_weight(weight) if fp8 else None,
                    "weights": torch.ones(tokens, device=GPU) if weighted else None,
                }
                loss.softcapped_cross_entropy(x, weight, targets, SOFTCAP, **given).backward()
            else:
                loss.token_losses(x, weight, targets, SOFTCAP, vocabulary, cast=cast)
        grads = [] if not grad else [str(p.grad.dtype) for p in (x, weight)]
    found = counter.by_operator()
    moved = {name: count for name, (_, count) in found.items()}
    products = {name: found.pop(name, [0, 0])[0] for name in PRODUCTS}
    return {
        "a_logit": sum(count for _, count in found.values()) / (tokens * vocabulary),
        "kernels": sum(launches for launches, _ in found.values()) + sum(products.values()),
        "products": products,
        "bytes": moved,
        "crossings": crossings.crossings,
        "grads": grads,
    }


# -----------------------------------------------------------------------------
# In the interpreter


def numbers(cases: list[dict[str, Any]], dtypes: list[str]) -> dict[str, Any]:
    """All comparisons of the kernel with operations in one process."""
    return {
        "kernel": [kernel_against_operations(**case) for case in cases],
        "pass": [pass_against_operations(dtype) for dtype in dtypes],
        "fp8": fp8_against_bf16(),
    }


def kernel_against_operations(vocabulary: int, padded: int, dtype: str, scale: float) -> dict[str, Any]:
    """The kernel beside `_losses_of_chunk` on the same logits, of which some are extreme.

    Returns:
        "losses": largest relative difference. "gradient": largest difference beyond one unit in the last
        place of the dtype. "padding": largest value left in padding and ignored rows. "hits": whether the
        likeliest tokens are the same. "weighted": as "gradient", by weights of the rows.
    """
    from nanochat.model.loss_kernel import softcapped_losses

    kind, rows, random = getattr(torch, dtype), 7, torch.Generator().manual_seed(0)
    z = (torch.randn(rows, padded, generator=random) * scale).to(kind)
    targets = torch.randint(0, vocabulary, (rows,), generator=random)
    targets[3] = loss.IGNORED
    z[5, :2], targets[5] = torch.tensor([1e4, -1e4]), 1  # all mass on a wrong token
    z[4, targets[4]] = 1e4
    z[6] = 2.0  # all equal: the first is the likeliest
    targets[6] = 0
    z[:, vocabulary:] = float("nan")
    valid, want, want_losses = targets >= 0, z[:, :vocabulary].clone(), torch.empty(rows)
    want_hits = (want.argmax(-1) == targets) & valid
    loss._losses_of_chunk(want, targets.clamp(min=0), SOFTCAP, want_losses, with_grad=True)
    losses, hits = torch.full((rows,), -7.0), torch.ones(rows, dtype=torch.bool)
    only, only_hits = z.clone(), torch.ones(rows, dtype=torch.bool)
    softcapped_losses(only, targets, losses.clone(), only_hits, SOFTCAP, vocabulary, 1.0, False)
    assert torch.equal(only[:, :vocabulary], z[:, :vocabulary]), "the logits changed without a gradient"
    weights = torch.tensor([1.0, -1.0, 0.3, torch.nan, -0.7, 0.0, 2.0**-9])  # of the ignored row none is read
    weighted, apart = z.clone(), torch.empty(rows)
    given = (SOFTCAP, vocabulary, loss._boost(kind), True, None, weights)
    softcapped_losses(weighted, targets, apart, None, *given)
    softcapped_losses(z, targets, losses, hits, SOFTCAP, vocabulary, loss._boost(kind), True)
    want, got = want.float() * valid[:, None], z[:, :vocabulary].float()
    eps = torch.finfo(kind).eps if kind != torch.float32 else 2e-5
    assert torch.equal(apart, losses), "weights changed the losses"
    want_weighted, got_weighted = want * weights[:, None], weighted[:, :vocabulary].float()
    want_weighted[3] = 0
    losses_off = (losses[valid] - want_losses[valid]).abs() / want_losses[valid].clamp(min=1e-3)
    return {
        "losses": losses_off.max().item(),
        "gradient": ((got - want).abs() - eps * want.abs()).max().item(),
        "weighted": ((got_weighted - want_weighted).abs() - 2 * eps * want_weighted.abs()).max().item(),
        "padding": max(z[:, vocabulary:].abs().sum().item(), z[3].abs().sum().item(), abs(losses[3].item())),
        "hits": torch.equal(hits, want_hits) and torch.equal(only_hits, want_hits),
    }


def pass_against_operations(dtype: str) -> dict[str, Any]:
    """Loss and gradients by way of the kernel beside those of operations: relative differences."""
    kind, random = getattr(torch, dtype), torch.Generator().manual_seed(1)
    x = torch.randn(50, 16, generator=random).to(kind).requires_grad_()
    weight = torch.randn(128, 16, generator=random).requires_grad_()
    targets = torch.randint(0, 100, (50,), generator=random)
    targets[::9] = loss.IGNORED
    weights = torch.randn(50, generator=random) * 1e-6
    answers = []
    for fused in (False, True):
        loss._is_fused = lambda x, fused=fused: fused  # type: ignore[assignment,misc]
        found = [*loss.token_losses(x, weight, targets, SOFTCAP, 100, 16)]
        for given in (None, weights):
            total = loss.softcapped_cross_entropy(
                x, weight, targets, SOFTCAP, vocab_size=100, chunk_rows=16, weights=given
            )
            scale = 1.0 if given is None else 2.0**14  # as fp16 is trained
            found += [total, *torch.autograd.grad(total * scale, (x, weight))]
        answers.append([t.float() for t in found])
    names = ("losses", "hits", "loss", "x", "weight", "weighted", "x weighted", "weight weighted")
    return {
        name: ((a - b).norm() / a.norm().clamp(min=1e-9)).item()
        for name, a, b in zip(names, *answers, strict=True)
    }


def fp8_against_bf16() -> dict[str, float]:
    """The head in fp8 beside bf16: relative differences of the loss and the weight's gradient, weighted too.

    "derivatives": the largest between those in e5m2 and in bf16, but for those that round to a power of two:
    the interpreter forgets the carry to their exponent.
    """
    from nanochat.model.loss_kernel import NARROW_BOOST, softcapped_losses

    random = torch.Generator().manual_seed(1)
    x = norm(torch.randn(96, 64, generator=random)).bfloat16().requires_grad_()
    weight = (torch.randn(256, 64, generator=random) * 0.3).requires_grad_()
    targets = torch.randint(0, 250, (96,), generator=random)
    targets[::9] = loss.IGNORED
    weights = torch.randn(96, generator=random) * 1e-6
    loss._is_fused = lambda x: True  # type: ignore[assignment]
    answers = []
    for fp8 in (False, True):
        eighth = quantize_weight(weight) if fp8 else None
        found = []
        for by in (None, weights):
            total = loss.softcapped_cross_entropy(
                x, weight, targets, SOFTCAP, vocab_size=250, chunk_rows=32, eighth=eighth, weights=by
            )
            found += [total, torch.autograd.grad(total, (x, weight))[1]]
        answers.append(found)
    z = (x @ weight.bfloat16().t()).detach()
    narrow = torch.empty(96, 256, dtype=torch.float8_e5m2)
    relative = torch.rand(96, generator=random) * 2 - 1
    softcapped_losses(z, targets, torch.empty(96), None, SOFTCAP, 250, 1.0, True, narrow, relative)
    want, got = z.float() * NARROW_BOOST, narrow.float()
    off = (got - want).abs() / want.abs().clamp(min=2.0**-14)
    carried = want.to(torch.float8_e5m2).float().abs().log2().frac() == 0
    names = ("loss", "weight", "weighted", "weight weighted")
    errors = {
        name: ((a.float() - b.float()).norm() / a.float().norm()).item()
        for name, a, b in zip(names, *answers, strict=True)
    }
    return {**errors, "derivatives": off[~carried].max().item()}
