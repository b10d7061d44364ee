"""Weights compared over the ranks: a digest of every parameter, which is equal only if all bits are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from nanochat.common.errors import UserError
from nanochat.distributed.world import World

CHUNK = 1 << 22  # elements hashed at a time: 64 MB of temporaries
ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 over the golden ratio, as int64: neighbours get unlike weights


def digest(tensor: Tensor) -> Tensor:
    """A checksum of the bits of an fp32 tensor, made where it is; 0-dim int64.

    Sums of integers that wrap around do not depend on the order: equal bits give equal digests on any device.
    Every bit weighs an odd number, or twice that and so on: one flipped bit always changes the sum.
    """
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start, part in enumerate(torch.split(tensor.detach().reshape(-1).view(torch.int32), CHUNK)):
        places = torch.arange(start * CHUNK, start * CHUNK + len(part), device=tensor.device)
        total += (part.long() * (places * ODD * 2 + 1)).sum()
    return total


def require_equal(tensors: Mapping[str, Tensor], world: World, step: int) -> None:
    """Compare tensors that should be alike on all ranks, which all call it.

    Args:
        tensors: fp32, by name, in the same order on all ranks.
        world: the ranks.
        step: for the message.

    Raises:
        UserError: on every rank; it names the ranks that differ from most, and the tensors.
    """
    by_rank = world.gather_ints(torch.stack([digest(tensor) for tensor in tensors.values()]).tolist())
    odd_ones: dict[int, list[str]] = {}
    for name, digests in zip(tensors, zip(*by_rank, strict=True), strict=True):
        usual = Counter(digests).most_common(1)[0][0]  # of equal counts, that of the lowest rank
        for rank, value in enumerate(digests):
            if value != usual:
                odd_ones.setdefault(rank, []).append(name)
    if odd_ones:
        told = "; ".join(
            f"rank {rank} in {', '.join(names[:3])}{f' and {len(names) - 3} more' if names[3:] else ''}"
            for rank, names in odd_ones.items()
        )
        raise UserError(
            f"step {step}: the weights are not the same on all ranks: {told}. Memory or a link is faulty, or "
            "a change has broken the optimizer. Go on from the last checkpoint with --resume=auto."
        )
