"""Asynchronous collectives: `Pending` keeps the work handle and the tensor that it reads until `wait()`."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from nanochat.distributed.world import World


@dataclass
class Pending:
    """A collective under way: `result` is whole after wait()."""

    result: Tensor
    source: Tensor
    work: dist.Work | None
    divide_by: int = 1

    def wait(self) -> Tensor:
        """Block until it has ended. On the handle: gloo has no future for reduce_scatter_tensor."""
        if self.work is not None:
            self.work.wait()
            self.work = None
            if self.divide_by > 1:
                self.result.div_(self.divide_by)
        return self.result


def mean_scatter(full: Tensor, world: World) -> Pending:
    """This rank's 1/W of the first dimension of `full`, averaged over the ranks."""
    if world.backend is None:
        return Pending(full, full, None)
    part = full.new_empty(full.size(0) // world.size, *full.shape[1:])
    return Pending(part, full, dist.reduce_scatter_tensor(part, full, async_op=True), world.size)


def mean(tensor: Tensor, world: World) -> Pending:
    """`tensor` averaged over the ranks, in place."""
    if world.backend is None:
        return Pending(tensor, tensor, None)
    return Pending(tensor, tensor, dist.all_reduce(tensor, async_op=True), world.size)


def gather(own: Tensor, world: World, into: Tensor | None = None) -> Pending:
    """The parts of all ranks, one after the other along the first dimension; `into` is where, if given."""
    if world.backend is None:
        return Pending(own, own, None)
    if into is None:
        into = own.new_empty(own.size(0) * world.size, *own.shape[1:])
    return Pending(into, own, dist.all_gather_into_tensor(into, own, async_op=True))
