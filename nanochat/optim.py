"""Muon and AdamW in one optimizer, sharded over the ranks (RECIPE 1.3, 1.4, 2.4; rules in update_rules.py).

Legend: K matrices of one shape (m, n), W ranks. As in ZeRO-2, a step averages the gradients over the ranks
and leaves each rank its part (reduce-scatter), the rank updates that part with moments that only it holds,
and the parameters are gathered. A Muon matrix is owned whole; a table under AdamW is cut into flat slices;
small tensors are averaged together in one buffer and updated by every rank. What does not divide by W is
padded here. With one rank the collectives are the identity and nothing else changes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nanochat.collectives import Pending, gather, mean, mean_scatter
from nanochat.errors import UserError
from nanochat.scaling import GroupPlan
from nanochat.update_rules import AdamRates, adamw_update, muon_update
from nanochat.world import World

# AdamW tensors below this are averaged together, and updated by every rank (RECIPE 1.6).
SMALL_ELEMENTS = 1024


@dataclass(frozen=True)
class StepResult:
    """What a step reports, as tensors on the device: reading them is what synchronizes.

    Attributes:
        grad_norm: 0-dim fp32, L2 norm of the gradient averaged over the ranks.
        applied: 0-dim bool, False if the gradient or the caller's `ok` was not fine on some rank; then no
            parameter and no moment has changed.
    """

    grad_norm: Tensor
    applied: Tensor


# ----------------------------------------------------------------------------------------------------
# the three ways in which parameters are shared out


@dataclass(frozen=True)
class _Rates:
    """Scalars of one step."""

    lr_mult: float
    momentum: Tensor
    muon_weight_decay: Tensor
    ok: Tensor


def _adam_rates(group: GroupPlan, rates: _Rates) -> AdamRates:
    return AdamRates(group.lr * rates.lr_mult, group.beta1, group.beta2, group.eps, group.weight_decay)


class _Shard(Protocol):
    """Some parameters and this rank's part of their state; a step calls the first four in this order."""

    def reduce(self) -> None:
        """Take the gradients from the parameters and start to average them."""

    def owned_grads(self) -> list[Tensor]:
        """Wait for the average; this rank's part of it."""

    def update(self, rates: _Rates) -> None:
        """Update what this rank owns and start to gather the parameters."""

    def finish(self) -> None:
        """Wait for the parameters."""

    def state(self, keep: bool) -> dict[str, Tensor]:
        """Whole moments by "<parameter>.<moment>", one after another, copied to host memory if kept."""

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Keep this rank's part of whole moments."""


def _take_grad(p: Tensor) -> Tensor:
    grad, p.grad = p.grad, None
    return torch.zeros_like(p) if grad is None else grad


class _MuonStack:
    """All Muon matrices of one shape. Of K matrices, padded to a multiple of W, each rank owns K / W."""

    def __init__(
        self,
        params: dict[str, Tensor],
        group: GroupPlan,
        world: World,
        dtype: torch.dtype,
        norm_factor: float,
    ) -> None:
        self.names, self.params = list(params), list(params.values())
        self.group, self.world, self.dtype, self.norm_factor = group, world, dtype, norm_factor
        self.m, self.n = self.params[0].shape
        self.each = -(-len(params) // world.size)
        self.own = slice(world.rank * self.each, (world.rank + 1) * self.each)
        like = self.params[0]
        self.momentum = like.new_zeros(self.each, self.m, self.n)
        moment_shape = (self.m, 1) if self.m >= self.n else (1, self.n)
        self.second_moment = like.new_zeros(self.each, *moment_shape)
        self.pending: Pending | None = None

    def _stack(self, tensors: Sequence[Tensor], count: int) -> Tensor:
        """(count, ...) of the tensors, zeros after the last."""
        out = self.params[0].new_zeros(count, *self.momentum.shape[1:])
        if tensors:
            torch.stack(list(tensors), out=out[: len(tensors)])
        return out

    def reduce(self) -> None:
        grads = [_take_grad(p) for p in self.params]
        self.pending = mean_scatter(self._stack(grads, self.each * self.world.size), self.world)

    def owned_grads(self) -> list[Tensor]:
        assert self.pending is not None
        return [self.pending.wait()]

    def update(self, rates: _Rates) -> None:
        (grads,) = self.owned_grads()
        params = self._stack(self.params[self.own], self.each)
        lr = self.group.lr * rates.lr_mult * math.sqrt(max(1.0, self.m / self.n))
        muon_update(
            params,
            grads,
            self.momentum,
            self.second_moment,
            lr=torch.tensor(lr),
            momentum=rates.momentum,
            weight_decay=rates.muon_weight_decay,
            beta2=self.group.beta2,
            ok=rates.ok,
            dtype=self.dtype,
            norm_factor=self.norm_factor,
        )
        self.pending = gather(params, self.world)

    def finish(self) -> None:
        assert self.pending is not None
        updated = self.pending.wait()
        torch._foreach_copy_(self.params, list(updated[: len(self.params)].unbind()))
        self.pending = None

    def state(self, keep: bool) -> dict[str, Tensor]:
        out = {}
        for moment, own in (("momentum", self.momentum), ("second_moment", self.second_moment)):
            for i in range(self.each):  # matrix by matrix, so that no device ever holds a second stack
                for j, matrix in enumerate(gather(own[i : i + 1], self.world).wait()):
                    if keep and (index := j * self.each + i) < len(self.names):
                        out[f"{self.names[index]}.{moment}"] = matrix.to("cpu", copy=True)
        return out

    def load(self, state: Mapping[str, Tensor]) -> None:
        for moment, own in (("momentum", self.momentum), ("second_moment", self.second_moment)):
            own.zero_()
            for i, name in enumerate(self.names[self.own]):
                own[i].copy_(_whole(state, f"{name}.{moment}", own.shape[1:]))


class _AdamTable:
    """One large AdamW tensor, flat and cut into W slices of equal length, the last ones padded."""

    def __init__(self, name: str, param: Tensor, group: GroupPlan, world: World) -> None:
        self.name, self.param, self.group, self.world = name, param, group, world
        self.flat = param.detach().view(-1)
        self.length = -(-self.flat.numel() // world.size)
        self.padded = self.length * world.size
        self.own = self.flat[world.rank * self.length : (world.rank + 1) * self.length]
        self.exp_avg, self.exp_avg_sq = self.flat.new_zeros(2, self.length).unbind()
        self.steps = self.flat.new_zeros(())
        self.pending: Pending | None = None

    def _pad(self, flat: Tensor, length: int) -> Tensor:
        """`flat` with zeros up to the length; itself if it is as long."""
        missing = length - flat.numel()
        return flat if missing == 0 else torch.cat((flat, flat.new_zeros(missing)))

    def reduce(self) -> None:
        grad = _take_grad(self.param).reshape(-1)
        self.pending = mean_scatter(self._pad(grad, self.padded), self.world)

    def owned_grads(self) -> list[Tensor]:
        assert self.pending is not None
        return [self.pending.wait()[: self.own.numel()]]

    def update(self, rates: _Rates) -> None:
        count = self.own.numel()
        adamw_update(
            [self.own],
            self.owned_grads(),
            [self.exp_avg[:count]],
            [self.exp_avg_sq[:count]],
            [self.steps],
            rates=_adam_rates(self.group, rates),
            ok=rates.ok,
        )
        into = self.flat if self.padded == self.flat.numel() else None
        # A copy goes out, for the parts may not be read from where they are written to.
        source = self.own if self.world.backend is None else self._pad(self.own.clone(), self.length)
        self.pending = gather(source, self.world, into)

    def finish(self) -> None:
        assert self.pending is not None
        whole = self.pending.wait()
        if whole.data_ptr() != self.flat.data_ptr():
            self.flat.copy_(whole[: self.flat.numel()])
        self.pending = None

    def state(self, keep: bool) -> dict[str, Tensor]:
        out = {}
        for moment, own in (("exp_avg", self.exp_avg), ("exp_avg_sq", self.exp_avg_sq)):
            whole = gather(own, self.world).wait()[: self.flat.numel()].view(self.param.shape)
            if keep:
                out[f"{self.name}.{moment}"] = whole.to("cpu", copy=True)
        return {**out, f"{self.name}.step": self.steps.to("cpu", copy=True)} if keep else {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.steps.copy_(_whole(state, f"{self.name}.step", torch.Size()))
        start, count = self.world.rank * self.length, self.own.numel()
        for moment, own in (("exp_avg", self.exp_avg), ("exp_avg_sq", self.exp_avg_sq)):
            whole = _whole(state, f"{self.name}.{moment}", self.param.shape).reshape(-1)
            own.zero_()[:count].copy_(whole[start : start + count])


class _AdamSmall:
    """All small AdamW tensors: averaged in one buffer, updated alike by every rank."""

    def __init__(self, params: dict[str, Tensor], groups: dict[str, GroupPlan], world: World) -> None:
        self.params = {name: p.detach() for name, p in params.items()}
        self.sources, self.groups, self.world = params, groups, world
        self.exp_avg = {name: torch.zeros_like(p) for name, p in self.params.items()}
        self.exp_avg_sq = {name: torch.zeros_like(p) for name, p in self.params.items()}
        self.steps = {name: p.new_zeros(()) for name, p in self.params.items()}
        self.pending: Pending | None = None

    def reduce(self) -> None:
        flat = [_take_grad(p).reshape(-1) for p in self.sources.values()]
        self.pending = mean(torch.cat(flat), self.world)

    def owned_grads(self) -> list[Tensor]:
        # Every rank holds the whole of these: scaled so that the squares add up to one copy over the ranks.
        assert self.pending is not None
        return [self.pending.wait() / math.sqrt(self.world.size)]

    def update(self, rates: _Rates) -> None:
        assert self.pending is not None
        parts = torch.split(self.pending.wait(), [p.numel() for p in self.params.values()])
        for (name, p), grad in zip(self.params.items(), parts, strict=True):
            group = self.groups[name]
            state = ([self.exp_avg[name]], [self.exp_avg_sq[name]], [self.steps[name]])
            adamw_update([p], [grad.view_as(p)], *state, rates=_adam_rates(group, rates), ok=rates.ok)

    def finish(self) -> None:
        self.pending = None

    def _moments(self) -> dict[str, Tensor]:
        kinds = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "step": self.steps}
        return {f"{name}.{kind}": t for kind, by_name in kinds.items() for name, t in by_name.items()}

    def state(self, keep: bool) -> dict[str, Tensor]:
        return {name: t.to("cpu", copy=True) for name, t in self._moments().items()} if keep else {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        for name, t in self._moments().items():
            t.copy_(_whole(state, name, t.shape))


def _whole(state: Mapping[str, Tensor], name: str, shape: torch.Size) -> Tensor:
    if name not in state:
        raise UserError(f"optimizer state: {name} is missing. Take a checkpoint of the same model.")
    if state[name].shape != shape:
        raise UserError(
            f"optimizer state: {name} has shape {tuple(state[name].shape)}, expected {tuple(shape)}. "
            "Take a checkpoint of the same model."
        )
    return state[name]


# ----------------------------------------------------------------------------------------------------
# the optimizer


class MuonAdamW:
    """Muon for the matrices, AdamW for the rest, one object for any number of ranks.

    A step consumes the gradients: afterwards every `.grad` is None.
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        kinds: Mapping[str, str],
        groups: Mapping[str, GroupPlan],
        world: World,
        compute_dtype: torch.dtype,
        norm_factor: float,
    ) -> None:
        """Share the parameters out; all moments start at zero.

        Args:
            params: fp32 parameters by name, in the same order on all ranks.
            kinds: kind of each parameter, a key of groups.
            groups: how each kind is updated (`Plan.groups`).
            world: the ranks.
            compute_dtype: of Muon's matrix products; fp32 where it is fp16, whose range is too small.
            norm_factor: see muon_update.
        """
        dtype = torch.float32 if compute_dtype == torch.float16 else compute_dtype
        self.world = world
        stacks: dict[tuple[str, torch.Size], dict[str, Tensor]] = {}
        small: dict[str, Tensor] = {}
        shards: list[_Shard] = []
        for name, p in params.items():
            kind = kinds[name]
            if groups[kind].optimizer == "muon":
                stacks.setdefault((kind, p.shape), {})[name] = p
            elif p.numel() < SMALL_ELEMENTS:
                small[name] = p
            else:
                shards.append(_AdamTable(name, p, groups[kind], world))
        for (kind, _), stack in stacks.items():
            shards.append(_MuonStack(stack, groups[kind], world, dtype, norm_factor))
        if small:
            shards.append(_AdamSmall(small, {name: groups[kinds[name]] for name in small}, world))
        self.shards = shards

    @torch.no_grad()
    def step(
        self, lr_mult: float, momentum: float, muon_weight_decay: float, ok: Tensor | None = None
    ) -> StepResult:
        """Average the gradients over the ranks and update the parameters; every rank calls it.

        A gradient that is not finite, on any rank, leaves all parameters and moments as they were.

        Args:
            lr_mult: factor of the schedule on every learning rate.
            momentum: Muon's momentum at this step.
            muon_weight_decay: Muon's weight decay at this step.
            ok: 0-dim bool on the device; False on any rank holds the update back (a loss that is not finite).
        """
        for shard in self.shards:
            shard.reduce()
        grads = [grad for shard in self.shards for grad in shard.owned_grads()]
        square = torch.nn.utils.get_total_norm(grads).square()
        bad = torch.zeros_like(square) if ok is None else (~ok).to(square)
        total_square, total_bad = self.world.all_reduce_sum(torch.stack((square, bad))).unbind()
        applied = torch.isfinite(total_square) & (total_bad == 0)
        rates = _Rates(lr_mult, torch.tensor(momentum), torch.tensor(muon_weight_decay), applied)
        for shard in self.shards:
            shard.update(rates)
        for shard in self.shards:
            shard.finish()
        return StepResult(grad_norm=total_square.sqrt(), applied=applied)

    @torch.no_grad()
    def state_tensors(self, keep: bool = True) -> dict[str, Tensor]:
        """Whole moments by "<parameter>.<moment>" in host memory; all ranks call it.

        Args:
            keep: False on a rank that only takes part: it gets nothing, and uses no memory for it.
        """
        out: dict[str, Tensor] = {}
        for shard in self.shards:
            out.update(shard.state(keep))
        return out

    @torch.no_grad()
    def load_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        """Take what state_tensors gave, on any number of ranks.

        Raises:
            UserError: a tensor is missing or has another shape.
        """
        for shard in self.shards:
            shard.load(state)
