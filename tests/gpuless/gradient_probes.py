"""The sum of gradients by Triton's interpreter, beside the same in operations of torch."""

from __future__ import annotations

import itertools

import torch

from nanochat.model.gradient_kernel import add_gradients


def differences() -> dict[str, float]:
    """The largest difference, by dtype of the gradients, over totals that are fresh or not, and one or two.

    Values are multiples of 1/8 that every dtype holds, so that stores of the interpreter round nothing.
    """
    random = torch.Generator().manual_seed(0)
    found: dict[str, float] = {}
    for dtype, fresh, pair, shape in itertools.product(
        (torch.bfloat16, torch.float16, torch.float32), (False, True), (False, True), ((7, 300), (64, 64))
    ):
        first, second = (torch.randint(-64, 64, (2, *shape), generator=random) / 8).to(dtype).unbind()
        total = torch.full(shape, torch.nan) if fresh else torch.randn(shape, generator=random)
        want = first.float() if fresh else total + first.float()
        if pair:
            want = want + second.float()
        add_gradients(total, first, second if pair else None, fresh)
        worst = (total - want).abs().max().item()
        found[str(dtype)] = max(found.get(str(dtype), 0.0), worst)
    return found
