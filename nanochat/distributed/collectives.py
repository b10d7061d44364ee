"""Asynchronous collectives: `Pending` keeps the work handle and the tensor that it reads until `wait()`.

Legend: W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.distributed.world import World


@dataclass
class Pending:
    """A collective under way.

    Attributes:
        result: whole after wait().
        source: what is sent, until wait().
        work: the handle, until wait(); None where there is nothing to wait for.
        divide_by: what the sum over the ranks is divided by.
        addends: tensors along the first dimension of `result` that wait() adds up, in fp32.
    """

    result: Tensor
    source: Tensor | None
    work: dist.Work | None
    divide_by: int = 1
    addends: int = 1

    def wait(self) -> Tensor:
        """Block until it has ended. On the handle: gloo has no future for reduce_scatter_tensor."""
        if self.work is not None:
            self.work.wait()
            self.work = self.source = None
            if self.addends > 1:
                parts = self.result.view(self.addends, -1, *self.result.shape[1:])
                self.result = parts.sum(0, dtype=torch.float32)
            if self.divide_by > 1:
                self.result.div_(self.divide_by)
        return self.result


def mean_scatter(full: Tensor, world: World) -> Pending:
    """This rank's 1/W of the first dimension of `full`, averaged over the ranks: fp32.

    Sums are in fp32 whatever the dtype of `full`. A reduce-scatter of bf16 would round at each of its W - 1
    additions; instead every rank receives the addends of its part, which is the same number of bytes on the
    wire, and adds them up itself, in the order of the ranks.

    Args:
        full: fp32 or, with more than one rank, bf16; W divides its first dimension.
        world: the ranks.
    """
    if world.backend is None:
        return Pending(full, None, None)
    if full.dtype == torch.bfloat16:
        parts = torch.empty_like(full)
        work = dist.all_to_all_single(parts, full, async_op=True)
        return Pending(parts, full, work, world.size, world.size)
    part = full.new_empty(full.size(0) // world.size, *full.shape[1:])
    return Pending(part, full, dist.reduce_scatter_tensor(part, full, async_op=True), world.size)


def mean(tensor: Tensor, world: World) -> Pending:
    """`tensor` averaged over the ranks, in place."""
    if world.backend is None:
        return Pending(tensor, None, None)
    return Pending(tensor, tensor, dist.all_reduce(tensor, async_op=True), world.size)


def gather(own: Tensor, world: World, into: Tensor | None = None) -> Pending:
    """The parts of all ranks, one after the other along the first dimension; `into` is where, if given."""
    if world.backend is None:
        return Pending(own, None, None)
    if into is None:
        into = own.new_empty(own.size(0) * world.size, *own.shape[1:])
    return Pending(into, own, dist.all_gather_into_tensor(into, own, async_op=True))
