"""The ranks of a run: who we are, what we agree on, and the only door to torch.distributed.

World size 1 is the ordinary case: every collective degrades to the identity, and callers never ask how many
we are.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.errors import UserError
from nanochat.hardware import detect_device


@dataclass(frozen=True)
class World:
    """The place of this process among the ranks of a run.

    Attributes:
        rank: 0 .. size-1; rank 0 writes files and prints.
        local_rank: rank among the processes of this machine.
        size: number of ranks.
        device: where this rank computes.
        backend: "nccl", "gloo", or None when alone.
    """

    rank: int
    local_rank: int
    size: int
    device: torch.device
    backend: str | None

    @staticmethod
    def solo(device: torch.device | str = "cpu") -> World:
        """A world of one rank, without any process group."""
        return World(rank=0, local_rank=0, size=1, device=torch.device(device), backend=None)

    @property
    def is_main(self) -> bool:
        """True on the rank that writes files and prints."""
        return self.rank == 0

    def print0(self, text: str) -> None:
        """Print a line, on the main rank only."""
        if self.is_main:
            print(text, flush=True)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.backend is not None:
            dist.barrier()

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over ranks, in place; returns it."""
        if self.backend is not None:
            dist.all_reduce(tensor)
        return tensor

    def agree(self, flag: bool) -> bool:
        """True on every rank if `flag` is true on any."""
        if self.backend is None:
            return flag
        votes = torch.tensor([int(flag)], device=self.device)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return bool(votes.item())

    def describe(self) -> dict[str, Any]:
        """What config.json records."""
        return {"world_size": self.size, "backend": self.backend, "device": str(self.device)}


def _rank_from_environment(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdigit():
        raise UserError(
            f"{name}={text!r}: expected a number. Start several ranks with torchrun, which sets it."
        )
    return int(text)


@contextlib.contextmanager
def join(device_type: str = "auto", timeout_s: float = 600.0) -> Iterator[World]:
    """Join the ranks that torchrun started, or be alone; leaves the process group at the end.

    Args:
        device_type: "auto", "cuda", "cpu" or "mps".
        timeout_s: how long a collective may wait for another rank.

    Raises:
        UserError: the device is absent, or torchrun's variables are unusable.
    """
    if "RANK" not in os.environ:
        yield World.solo(detect_device(device_type, 0))
        return
    rank, local_rank, size = (_rank_from_environment(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    device = detect_device(device_type, local_rank)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        timeout=datetime.timedelta(seconds=timeout_s),
        device_id=device if device.type == "cuda" else None,
    )
    try:
        yield World(rank=rank, local_rank=local_rank, size=size, device=device, backend=backend)
    finally:
        dist.destroy_process_group()
