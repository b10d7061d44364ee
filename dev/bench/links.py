"""Rates of the links between ranks: of all-reduce, and of each link of a ring, so that a slow one has a name.

    torchrun --nproc_per_node=8 -m dev.bench.links

On several machines, torchrun is started on each with the options of the run whose links are in doubt.
"""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.distributed import world as ranks
from nanochat.distributed.world import World

CPU_BYTES, CUDA_BYTES = 4 << 20, 64 << 20
MOST_LINKS = 16  # more ranks than this: only the links between machines are measured one by one
SLOW = 0.4  # a link is named if it has less than this share of the median of its kind


@dataclass(frozen=True)
class Link:
    """What a rank received from the one before it.

    Attributes:
        source: rank that sent.
        target: rank that received.
        across: whether they are on two machines.
        bytes_per_s: how fast.
    """

    source: int
    target: int
    across: bool
    bytes_per_s: float


def report(world: World) -> list[str]:
    """Measure all-reduce and the links of a ring of all ranks; all ranks call it. Takes less than a second.

    Returns:
        Lines for the console; none where there is one rank.
    """
    if world.size == 1:
        return []
    buffer = torch.ones((CUDA_BYTES if world.device.type == "cuda" else CPU_BYTES) // 4, device=world.device)
    nodes = [number for (number,) in world.gather_ints([int(os.environ.get("GROUP_RANK", "0"))])]
    machines = sorted(set(nodes))
    whole = _rate(_all_reduce(buffer, None, world))
    lines = [f"all-reduce over {world.size} ranks (machines: {len(machines)}): {whole}"]
    if 1 < len(machines) < world.size:
        groups = [[rank for rank, node in enumerate(nodes) if node == machine] for machine in machines]
        group, _ = dist.new_subgroups_by_enumeration(groups)
        assert isinstance(group, dist.ProcessGroup)
        own = _all_reduce(buffer, group, world)
        rates = [rate for (rate,) in world.gather_ints([int(own)])]
        lines.append(f"all-reduce within machines: {_rate(min(rates))} to {_rate(max(rates))}")
    return lines + describe(_ring(buffer, nodes, world))


def describe(links: list[Link]) -> list[str]:
    """Medians of the links within and across machines, and the names of those far below."""
    lines = []
    for across, kind in ((False, "within a machine"), (True, "between machines")):
        rates = {(link.source, link.target): link.bytes_per_s for link in links if link.across == across}
        if not rates:
            continue
        median = statistics.median(rates.values())
        lines.append(f"links {kind}: {_rate(median)} (median of {len(rates)})")
        lines += [
            f"warning: the link from rank {source} to rank {target} is slow: {_rate(rate)}"
            for (source, target), rate in rates.items()
            if rate < SLOW * median
        ]
    return lines


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.2f} GB/s"


def _timed(action: Callable[[], object], world: World) -> float:
    """Seconds that an action takes once it has been done before, when all ranks begin it together."""
    for _ in range(2):
        world.barrier()
        started = time.perf_counter()
        action()
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
    return time.perf_counter() - started


def _all_reduce(buffer: Tensor, group: dist.ProcessGroup | None, world: World) -> float:
    """Bytes a second through each rank: a ring of n moves 2 (n - 1) / n of the buffer."""
    size = dist.get_world_size(group)
    seconds = _timed(lambda: dist.all_reduce(buffer, group=group), world)
    return 2 * (size - 1) / size * buffer.numel() * 4 / seconds


def _ring(buffer: Tensor, nodes: list[int], world: World) -> list[Link]:
    """Every link from a rank to the next, one at a time; with many ranks only those between machines."""
    rates = []
    pairs = [(rank, (rank + 1) % world.size) for rank in range(world.size)]
    pairs = [(a, b) for a, b in pairs if world.size <= MOST_LINKS or nodes[a] != nodes[b]]
    for source, target in pairs:
        seconds = _timed(functools.partial(_pass_on, buffer, source, target, world), world)
        rates.append(buffer.numel() * 4 / seconds)
    seen = world.gather_ints([int(rate) for rate in rates])
    return [
        Link(source, target, nodes[source] != nodes[target], seen[target][index])
        for index, (source, target) in enumerate(pairs)
    ]


def _pass_on(buffer: Tensor, source: int, target: int, world: World) -> None:
    """Send the buffer from one rank to another. Batched, so that NCCL opens no communicator for the pair."""
    ops = []
    if world.rank == source:
        ops.append(dist.P2POp(dist.isend, buffer, target))
    if world.rank == target:
        ops.append(dist.P2POp(dist.irecv, torch.empty_like(buffer), source))
    for work in dist.batch_isend_irecv(ops) if ops else []:
        work.wait()


def main() -> None:
    """Print the rates of the ranks that torchrun has started."""
    with ranks.join() as world:
        for line in report(world) or ["one rank: there is no link to measure"]:
            world.print0(line)


if __name__ == "__main__":
    main()
