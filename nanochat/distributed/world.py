"""The ranks of a run: rank and device of this process, small collectives, the start by torchrun.

World size 1 is the ordinary case: there, every collective is the identity, and no caller has a branch for it.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.rendezvous import rendezvous as torch_rendezvous

from nanochat.common import files, machine
from nanochat.common.errors import UserError
from nanochat.distributed import interfaces

BACKSTOP_S = 30.0


@dataclass(frozen=True)
class World:
    """The place of this process among the ranks of a run.

    Attributes:
        rank: 0 .. size-1; rank 0 writes files and prints.
        size: number of ranks.
        device: where this rank computes.
        backend: "nccl", "gloo", or None when alone.
        control: a gloo group of all ranks, for words that must not wait for a device.
        store: the torch.distributed.Store where ranks leave notes for each other, on a connection of its own.
        launch: what torchrun calls this start of it; the same after it has restarted its workers.
        restarts: how often it has restarted them because one failed.
    """

    rank: int
    size: int
    device: torch.device
    backend: str | None
    control: dist.ProcessGroup | None = None
    store: Any = None
    launch: str = ""
    restarts: int = 0

    @staticmethod
    def single_process(device: torch.device | str = "cpu") -> World:
        """A world of one rank, without any process group."""
        return World(rank=0, size=1, device=torch.device(device), backend=None)

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

    def any_rank(self, flag: bool) -> bool:
        """True on every rank if `flag` is true on any. Waits for no device."""
        return bool(self.max_over_ranks(int(flag)))

    def max_over_ranks(self, value: int) -> int:
        """The highest of the ranks' values, on every rank. Waits for no device."""
        if self.backend is None:
            return value
        highest = torch.tensor([value])
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=self.control)
        return int(highest.item())

    def gather_ints(self, values: list[int]) -> list[list[int]]:
        """The equally many 64-bit integers of each rank, by rank, on every rank. Waits for no device."""
        if self.backend is None:
            return [values]
        sent = torch.tensor(values, dtype=torch.int64)
        received = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(received, sent, group=self.control)
        return [tensor.tolist() for tensor in received]

    def be_patient(self, timeout_s: float) -> None:
        """From now on gloo waits so long for a rank, where somebody else finds those that hang."""
        set_timeout = getattr(dist, "set_timeout", distributed_c10d._set_pg_timeout)  # the older name
        for group in (self.control, dist.group.WORLD if self.backend == "gloo" else None):
            if group is not None:
                set_timeout(datetime.timedelta(seconds=timeout_s), group)

    def collectives_begun(self) -> int:
        """Collectives that this rank has entered: of two, the one with fewer keeps the other waiting."""
        groups: list[Any] = [group for group in (dist.group.WORLD, self.control) if group is not None]
        return sum(group._get_sequence_number_for_group() for group in groups)

    def describe(self) -> dict[str, Any]:
        """What config.json records."""
        launch = {"world_size": self.size, "backend": self.backend, "launch": self.launch}
        return launch | {"device": str(self.device)}


def _rank_from_environment(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdigit():
        raise UserError(
            f"{name}={text!r}: expected a number. Start several ranks with torchrun, which sets it."
        )
    return int(text)


def rendezvous(store: Any, rank: int, size: int, timeout_s: float) -> Any:
    """A part of the store that only the ranks of this start share.

    torchrun may keep one store over its restarts (2.15 does), and then the addresses of the dead are still in
    it. Every name here was made up by a rank a moment ago, so no word of an earlier start is taken for one of
    this: a rank greets by its name, rank 0 answers that name with its own, and the rank confirms.

    Args:
        store: the torch.distributed.Store of torchrun.
        rank: 0 .. size-1.
        size: number of ranks.
        timeout_s: how long to wait for the others.

    Raises:
        UserError: a rank has not come by then.
    """
    own = uuid.uuid4().hex
    deadline = time.monotonic() + timeout_s

    def note(key: str) -> str:
        return store.get(key).decode() if store.check([key]) else ""

    def wait_for(*ranks: int) -> None:
        if time.monotonic() > deadline:
            names = ", ".join(map(str, ranks))
            raise UserError(
                f"rank {rank}: rank {names} of {size} did not join within {timeout_s:g} s. "
                "Look at its output, and whether its machine can be reached; --dist-timeout waits longer."
            )
        time.sleep(0.01)

    if rank == 0:
        missing = list(range(1, size))
        while missing := [other for other in missing if note(f"meet/confirmed/{other}") != own]:
            for other in missing:
                if name := note(f"meet/greeting/{other}"):
                    store.set(f"meet/answer/{other}", f"{name} {own}")
            wait_for(*missing)
        return distributed_c10d.PrefixStore(own, store)
    store.set(f"meet/greeting/{rank}", own)
    while not (answer := note(f"meet/answer/{rank}")).startswith(own):
        wait_for(0)
    first = answer.split()[1]
    store.set(f"meet/confirmed/{rank}", first)
    return distributed_c10d.PrefixStore(first, store)


def choose_interfaces(store: Any, rank: int, local_rank: int, size: int) -> None:
    """Tell gloo and NCCL which network interface leads to the other machines, unless the user has told them.

    Args:
        store: the torch.distributed.Store that the ranks of this start share.
        rank: 0 .. size-1.
        local_rank: number of this rank on its machine; the first one says what is chosen.
        size: number of ranks.

    Raises:
        UserError: there are several machines, and no interface can be named.
    """
    if os.environ.get("LOCAL_WORLD_SIZE") == str(size):  # one machine
        return
    host, port = os.environ["MASTER_ADDR"], _rank_from_environment("MASTER_PORT")
    own = interfaces.announce(store, rank, host, port)
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    missing = [name for name in names if name not in os.environ]
    name, address = interfaces.find(store, own, rank, size, port) if missing else ("", "")
    if not name:
        return
    for variable in missing:  # without the sign, NCCL's is what a name begins with
        os.environ[variable] = f"={name}" if variable.startswith("NCCL") else name
    if local_rank == 0:
        route = f"{name} ({address}) leads to the other machines"
        print(f"{socket.gethostname()}: {route}; {' and '.join(names)} choose another", flush=True)


@contextlib.contextmanager
def join(device_type: str = "auto", timeout_s: float = 600.0) -> Iterator[World]:
    """Join the ranks that torchrun started, or be alone; leaves the process group at the end.

    Args:
        device_type: "auto", "cuda", "cpu" or "mps".
        timeout_s: how long a rank may keep the others waiting. Collectives give up BACKSTOP_S later, so that
            a watchdog has time to say which rank it is.

    Raises:
        UserError: the device is absent, torchrun's variables are unusable, or a rank does not come.
    """
    files.keep_compiled()  # before torch, which sets it at the first import of its compiler
    machine.grow_segments()  # before torch, which reads it when CUDA starts
    if "RANK" not in os.environ:
        yield World.single_process(machine.detect_device(device_type, 0))
        return
    rank, local_rank, size = (_rank_from_environment(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    device = machine.detect_device(device_type, local_rank)
    gpu = device if device.type == "cuda" else None
    backend = "gloo" if gpu is None else "nccl"
    if gpu is not None:
        torch.cuda.set_device(gpu)
    timeout = datetime.timedelta(seconds=timeout_s + BACKSTOP_S)
    launched, _, _ = next(torch_rendezvous("env://", timeout=timeout))
    store = rendezvous(launched, rank, size, timeout_s)
    choose_interfaces(store, rank, local_rank, size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout, device_id=gpu)
    control = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(control, dist.ProcessGroup)
    try:
        launch = os.environ.get("TORCHELASTIC_RUN_ID", "")
        restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        yield World(rank, size, device, backend, control, store.clone(), launch, restarts)
    finally:
        dist.destroy_process_group()
