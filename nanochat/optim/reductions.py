"""Reductions: when the gradients of each shard of the optimizer begin to be averaged over the ranks.

They may begin while the last backward pass of a step still runs, so that what travels hides behind what is
computed. Every rank begins its collectives in one order, about that in which a backward pass makes the
gradients: the reverse of that of the parameters, where the first parameter of a shard stands for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from nanochat.distributed.collectives import Pending


class Reducible(Protocol):
    """Some parameters whose gradients travel together."""

    names: list[str]
    pending: Pending | None

    def reduce(self) -> None:
        """Take the gradients from the parameters and start to average them."""


class Reductions:
    """Begins each shard's reduction once a step, at the latest with the step itself."""

    def __init__(self, shards: Sequence[Reducible], params: Mapping[str, Tensor], early: bool) -> None:
        """Put the shards in order.

        Args:
            shards: which share the parameters out.
            params: by name, in the order in which a forward pass uses them, or nearly.
            early: False where gradients are changed after the last pass, or nothing travels; then `early`
                and `catch_up` do nothing.
        """
        self.params, self.is_early = list(params.values()), early
        place = {name: i for i, name in enumerate(params)}
        ordered = sorted(shards, key=lambda shard: -place[shard.names[0]])
        self._order = [(shard, {id(params[name]) for name in shard.names}) for shard in ordered]
        self._left, self._whole = list(self._order), set[int]()

    @contextlib.contextmanager
    def early(self) -> Iterator[None]:
        """Around the last backward pass of a step: within, a shard is reduced once its gradients are whole.

        A parameter has the attribute `grad_ready` within, for whoever makes its gradient outside of autograd
        to call with it. In a graph of torch.compile the gradients of all that is in it come at once at the
        end: then only what is outside, such as the head, overlaps.
        """
        if not self.is_early:
            yield
            return
        hooks = []
        for p in self.params:
            p.grad_ready = self.ready  # type: ignore[attr-defined]
            hooks.append(p.register_post_accumulate_grad_hook(self.ready))  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for p in self.params:
                del p.grad_ready  # type: ignore[attr-defined]

    @torch.no_grad()
    def ready(self, p: Tensor) -> None:
        """Take note that the gradient of a parameter is whole, and reduce the shards whose turn has come."""
        self._whole.add(id(p))
        while self._left and self._left[0][1] <= self._whole:
            self._begin_next()

    def _begin_next(self) -> None:
        self._left[0][0].reduce()
        self._left.pop(0)  # afterwards: where memory runs out in between, it is still to be begun

    @torch.no_grad()
    def begin_all(self) -> None:
        """Begin every reduction that is not under way."""
        while self._left:
            self._begin_next()

    def catch_up(self) -> None:
        """After the passes, also if they failed: begin what is left, where reductions begin early.

        So all ranks have begun the same collectives before they agree on whether the passes count.
        """
        if self.is_early:
            self.begin_all()

    def abandon(self) -> None:
        """Wait for what is under way and drop it; every rank calls it, after catch_up."""
        for shard, _ in self._order:
            if shard.pending is not None:
                shard.pending.wait()
                shard.pending = None
        self.expect()

    def expect(self) -> None:
        """From here on, gradients are those of another step, or of another try at this one."""
        self._left = list(self._order)
        self._whole.clear()
