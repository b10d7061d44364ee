"""Bits per byte: the loss of a model in a unit that does not depend on its tokenizer."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from nanochat.errors import UserError
from nanochat.gpt import GPT
from nanochat.world import World


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Loss in nats over the bytes that the predicted tokens spell (RECIPE 1.5).

    >>> round(bits_per_byte(math.log(2) * 8, 8), 12)
    1.0
    """
    return nats / (math.log(2) * n_bytes)


@torch.no_grad()
def evaluate_bpb(
    model: GPT, batches: Iterable[tuple[Tensor, Tensor]], token_bytes: np.ndarray, world: World
) -> float:
    """Bits per byte of a model over batches, each rank giving its own.

    Tokens that spell no bytes (the special ones) count neither in the loss nor in the bytes.

    Args:
        model: on `world.device`.
        batches: (inputs, targets), each (B, T) int64; a target of -1 is ignored.
        token_bytes: (V,) bytes of each token, 0 for the special ones.
        world: losses and bytes are summed over its ranks, so that the result is the same on all of them.

    Raises:
        UserError: no batch on any rank has a token that spells a byte.
    """
    bytes_of = torch.as_tensor(token_bytes, dtype=torch.int64, device=world.device)
    # fp32 sums of one batch, added in float64 at the end: no wait for the device, no loss of digits.
    nats: list[Tensor] = []
    counts: list[Tensor] = []
    for inputs, targets in batches:
        targets = targets.to(world.device)
        spelled = torch.where(targets >= 0, bytes_of[targets.clamp(min=0)], 0)
        losses = model.loss(inputs.to(world.device), targets, reduction="none").view(targets.shape)
        nats.append((losses.float() * (spelled > 0)).sum())
        counts.append(spelled.sum())
    # The device of a lone rank may lack float64 (mps); the CPU has it.
    where = "cpu" if world.backend is None else world.device
    mine = [torch.stack(part).to("cpu", torch.float64).sum() if part else 0.0 for part in (nats, counts)]
    total_nats, total_bytes = world.all_reduce_sum(
        torch.tensor([float(part) for part in mine], dtype=torch.float64, device=where)
    ).tolist()
    if not total_bytes:
        raise UserError("bits per byte: no tokens to evaluate on. Give a larger --eval-tokens or more data.")
    return bits_per_byte(total_nats, int(total_bytes))
