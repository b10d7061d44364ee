"""Muon/SOAP/AdamW with ZeRO-2 sharding, for any number of ranks (RECIPE 1.3, 1.4, 2.4; 4).

Legend: K matrices of one shape (m, n), W ranks. As in ZeRO-2, a step averages the gradients over the ranks
and leaves each rank its part (reduce-scatter), the rank updates that part with moments that only it holds,
and the parameters are gathered. Each matrix belongs to one rank, and the rule of its group updates it; an
embedding is cut into flat slices for AdamW; small tensors are averaged in one buffer and updated by every
rank. What W does not divide is padded. With one rank the collectives are the identity, and nothing else is
different. Gradients may travel in bf16; they are added up in fp32.
"""

from __future__ import annotations

import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from nanochat.common.errors import UserError
from nanochat.config.plan import GroupPlan
from nanochat.config.recipes import MATRIX_OPTIMIZERS
from nanochat.distributed.collectives import Pending, gather, mean, mean_scatter
from nanochat.distributed.world import World
from nanochat.optim.adamw import adamw_update
from nanochat.optim.rates import MatrixOptions, MatrixRule, StepRates, sum_of_squares
from nanochat.optim.reductions import Reducible, Reductions

# AdamW tensors below this are averaged together, and updated by every rank (RECIPE 1.6).
SMALL_ELEMENTS = 1024
TABLES = ("embedding", "value_embedding")  # kinds that a forward pass looks up before all else


@dataclass(frozen=True)
class UpdateResult:
    """What an update reports, alike on all ranks, as tensors on the device: reading them synchronizes.

    Attributes:
        grad_norm: 0-dim fp32, L2 norm of the gradient averaged over the ranks.
        applied: 0-dim bool, False if the gradient or the caller's `ok` was not fine on some rank; then no
            parameter and no moment has changed.
        grad_squares: (P,) fp32, sum of squares of each parameter's averaged gradient, in the order of
            `MuonAdamW.names`; not finite where the gradient is not.
        update_squares: (P,) fp32, sum of squares of what was added to each parameter.
        not_ok: (W,) fp32, 1 for the ranks whose `ok` was False.
    """

    grad_norm: Tensor
    applied: Tensor
    grad_squares: Tensor
    update_squares: Tensor
    not_ok: Tensor


# ----------------------------------------------------------------------------------------------------
# the three ways in which parameters are shared out


class _Shard(Reducible, Protocol):
    """Some parameters and this rank's part of their state; a step calls reduce, then these in this order."""

    moment_names: list[str]

    def grad_squares(self) -> Tensor:
        """Wait for the average; the squares of this rank's part of it, summed by parameter."""

    def update(self, rates: StepRates) -> Tensor:
        """Update what this rank owns, start to gather the parameters; squares as in grad_squares."""

    def finish(self) -> None:
        """Wait for the parameters."""

    def state(self, keep: bool) -> dict[str, Tensor]:
        """Whole moments by "<parameter>.<moment>", one after another, copied to host memory if kept."""

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Keep this rank's part of whole moments."""


def _take_grad(p: Tensor) -> Tensor:
    grad, p.grad = p.grad, None
    return torch.zeros_like(p) if grad is None else grad


class _MatrixStack:
    """All matrices of one shape. Of K matrices, padded to a multiple of W, each rank owns K / W."""

    def __init__(
        self,
        params: dict[str, Tensor],
        world: World,
        wire: torch.dtype | None,
        make_rule: Callable[[Tensor], MatrixRule],
    ) -> None:
        self.names, self.params = list(params), list(params.values())
        self.world, self.wire = world, wire
        self.each = -(-len(params) // world.size)
        self.own = slice(world.rank * self.each, (world.rank + 1) * self.each)
        self.rule = make_rule(self._stack([], self.each))
        self.moment_names = list(self.rule.moments)
        self.pending: Pending | None = None

    def _stack(self, tensors: Sequence[Tensor], count: int, dtype: torch.dtype | None = None) -> Tensor:
        """(count, ...) of the tensors, zeros after the last; by default in the parameters' dtype."""
        out = self.params[0].new_empty(count, *self.params[0].shape, dtype=dtype)
        out[len(tensors) :] = 0
        if tensors:
            torch.stack(list(tensors), out=out[: len(tensors)])
        return out

    def reduce(self) -> None:
        grads = [_take_grad(p) for p in self.params]
        full = self._stack(grads, self.each * self.world.size, self.wire)
        self.pending = mean_scatter(full, self.world)

    def _of_all(self, owned: Tensor) -> Tensor:
        """(K,) from (each,) figures of the owned matrices; 0 for those of other ranks."""
        out = owned.new_zeros(self.each * self.world.size)
        out[self.own] = owned
        return out[: len(self.names)]

    def grad_squares(self) -> Tensor:
        assert self.pending is not None
        return self._of_all(sum_of_squares(self.pending.wait()))

    def update(self, rates: StepRates) -> Tensor:
        assert self.pending is not None
        grads = self.pending.wait()
        params = self._stack(self.params[self.own], self.each)
        squares = self.rule.update(params, grads, rates)
        self.pending = gather(params, self.world)
        return self._of_all(squares)

    def finish(self) -> None:
        assert self.pending is not None
        updated = self.pending.wait()
        torch._foreach_copy_(self.params, list(updated[: len(self.params)].unbind()))
        self.pending = None

    def state(self, keep: bool) -> dict[str, Tensor]:
        out = {}
        for moment, own in self.rule.moments.items():
            for i in range(self.each):  # matrix by matrix, so that no device ever holds a second stack
                for j, matrix in enumerate(gather(own[i : i + 1], self.world).wait()):
                    if keep and (index := j * self.each + i) < len(self.names):
                        out[f"{self.names[index]}.{moment}"] = matrix.to("cpu", copy=True)
        return out

    def load(self, state: Mapping[str, Tensor]) -> None:
        for moment, own in self.rule.moments.items():
            for i, name in enumerate(self.names[self.own]):
                own[i].copy_(_whole(state, f"{name}.{moment}", own.shape[1:]))


class _AdamTable:
    """One large AdamW tensor, flat and cut into W slices of equal length, the last ones padded."""

    def __init__(
        self, name: str, param: Tensor, group: GroupPlan, world: World, wire: torch.dtype | None
    ) -> None:
        self.names, self.name, self.param = [name], name, param
        self.moment_names = ["exp_avg", "exp_avg_sq", "step"]
        self.group, self.world, self.wire = group, world, wire
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
        grad = grad if self.wire is None else grad.to(self.wire)
        self.pending = mean_scatter(self._pad(grad, self.padded), self.world)

    def _owned_grad(self) -> Tensor:
        assert self.pending is not None
        return self.pending.wait()[: self.own.numel()]

    def grad_squares(self) -> Tensor:
        return sum_of_squares(self._owned_grad()[None])

    def update(self, rates: StepRates) -> Tensor:
        count = self.own.numel()
        squares = adamw_update(
            self.own,
            self._owned_grad(),
            self.exp_avg[:count],
            self.exp_avg_sq[:count],
            self.steps,
            self.group,
            rates,
        )
        into = self.flat if self.padded == self.flat.numel() else None
        # A copy goes out, for the parts may not be read from where they are written to.
        source = self.own if self.world.backend is None else self._pad(self.own.clone(), self.length)
        self.pending = gather(source, self.world, into)
        return squares

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
        self.names = list(params)
        self.moment_names = ["exp_avg", "exp_avg_sq", "step"]
        self.params = {name: p.detach() for name, p in params.items()}
        self.sources, self.groups, self.world = params, groups, world
        self.exp_avg = {name: torch.zeros_like(p) for name, p in self.params.items()}
        self.exp_avg_sq = {name: torch.zeros_like(p) for name, p in self.params.items()}
        self.steps = {name: p.new_zeros(()) for name, p in self.params.items()}
        self.pending: Pending | None = None

    def reduce(self) -> None:
        flat = [_take_grad(p).reshape(-1) for p in self.sources.values()]
        self.pending = mean(torch.cat(flat), self.world)

    def _grads(self) -> list[Tensor]:
        assert self.pending is not None
        parts = torch.split(self.pending.wait(), [p.numel() for p in self.params.values()])
        return [part.view_as(p) for part, p in zip(parts, self.params.values(), strict=True)]

    def grad_squares(self) -> Tensor:
        # Every rank holds the whole of these: scaled so that the sum over the ranks is one copy's.
        return torch.stack(torch._foreach_norm(self._grads())).square() / self.world.size

    def update(self, rates: StepRates) -> Tensor:
        squares = []
        for (name, p), grad in zip(self.params.items(), self._grads(), strict=True):
            state = (self.exp_avg[name], self.exp_avg_sq[name], self.steps[name])
            squares.append(adamw_update(p, grad, *state, self.groups[name], rates))
        return torch.cat(squares) / self.world.size

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
    """A moment as it was given: one of another dtype would be taken, and other numbers would follow."""
    found = state[name]
    if found.shape != shape or found.dtype != torch.float32:
        raise UserError(
            f"{name} is {found.dtype} of shape {tuple(found.shape)}, expected torch.float32 of shape "
            f"{tuple(shape)}. Take a checkpoint of the same model."
        )
    return found


# ----------------------------------------------------------------------------------------------------
# the optimizer


class MuonAdamW:
    """Muon, SOAP or AdamW for the matrices, AdamW for the rest, one object for any number of ranks.

    A step consumes the gradients: afterwards every `.grad` is None.

    Attributes:
        reductions: when the gradients begin to travel.
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        kinds: Mapping[str, str],
        groups: Mapping[str, GroupPlan],
        world: World,
        compute_dtype: torch.dtype,
        options: MatrixOptions,
        grad_reduce_dtype: torch.dtype = torch.float32,
    ) -> None:
        """Share the parameters out; all moments start at zero.

        Args:
            params: fp32 parameters by name, in the same order on all ranks.
            kinds: kind of each parameter, a key of groups.
            groups: how each kind is updated (`Plan.groups`).
            world: the ranks.
            compute_dtype: of Muon's matrix products; fp32 where it is fp16, whose range is too small.
            options: of the rules for matrices.
            grad_reduce_dtype: what gradients of matrices and tables are rounded to where they travel to
                another rank, fp32 or bf16.
        """
        wire = torch.bfloat16 if grad_reduce_dtype == torch.bfloat16 and world.size > 1 else None
        dtype = torch.float32 if compute_dtype == torch.float16 else compute_dtype
        self.world = world
        stacks: dict[torch.Size, dict[str, Tensor]] = {}
        small: dict[str, Tensor] = {}
        shards: list[_Shard] = []
        for name, p in params.items():
            kind = kinds[name]
            if kind == "matrix":
                stacks.setdefault(p.shape, {})[name] = p
            elif p.numel() < SMALL_ELEMENTS:
                small[name] = p
            else:
                shards.append(_AdamTable(name, p, groups[kind], world, wire))
        rule = pkgutil.resolve_name(MATRIX_OPTIMIZERS[groups["matrix"].optimizer].rule)
        make = partial(rule, group=groups["matrix"], dtype=dtype, options=options)
        shards.extend(_MatrixStack(stack, world, wire, make) for stack in stacks.values())
        if small:
            shards.append(_AdamSmall(small, {name: groups[kinds[name]] for name in small}, world))
        self.shards = shards
        self.names = [name for shard in shards for name in shard.names]
        self._kinds = [kinds[name] for name in self.names]
        self._sizes = [params[name].numel() for name in self.names]
        # fp16 gradients are scaled back after the passes, and with one rank nothing travels.
        early = world.size > 1 and compute_dtype != torch.float16
        order = sorted(params, key=lambda name: kinds[name] not in TABLES)
        self.reductions = Reductions(shards, {name: params[name] for name in order}, early)

    @torch.no_grad()
    def step(
        self,
        lr_mult: float,
        momentum: float,
        weight_decay: float,
        ok: Tensor | None = None,
        index: int = 0,
    ) -> UpdateResult:
        """Average the gradients over the ranks and update the parameters; every rank calls it.

        A gradient that is not finite, on any rank, leaves all parameters and moments as they were.

        Args:
            lr_mult: factor of the schedule on every learning rate.
            momentum: Muon's momentum at this step.
            weight_decay: weight decay of the matrices at this step.
            ok: 0-dim bool on the device; False on any rank holds the update back (a loss that is not finite).
            index: steps of the run before this one, which decide when SOAP finds and renews its bases.
        """
        self.reductions.begin_all()
        squares = torch.cat([shard.grad_squares() for shard in self.shards])
        not_ok = squares.new_zeros(self.world.size)
        if ok is not None:
            not_ok[self.world.rank] = (~ok).to(squares)
        both = self.world.all_reduce_sum(torch.cat((squares, not_ok)))
        squares, not_ok = both[: len(self.names)], both[len(self.names) :]
        total = squares.sum()
        applied = torch.isfinite(total) & (not_ok.sum() == 0)
        lr, mu, decay = (total.new_full((), value) for value in (lr_mult, momentum, weight_decay))
        rates = StepRates(index, lr_mult, weight_decay, lr, mu, decay, applied)
        update_squares = torch.cat([shard.update(rates) for shard in self.shards])
        for shard in self.shards:
            shard.finish()
        self.reductions.expect()
        update_squares = self.world.all_reduce_sum(update_squares)
        return UpdateResult(total.sqrt(), applied, squares, update_squares, not_ok)

    def compile_updates(self) -> None:
        """Let torch.compile make the update of each shape of matrices; AdamW's is one kernel already."""
        for shard in self.shards:
            if isinstance(shard, _MatrixStack):
                shard.rule.compile()

    def rms_by_kind(self, squares: Sequence[float]) -> dict[str, float]:
        """Root mean squares over all elements of each kind, from sums of squares by parameter."""
        totals, counts = dict.fromkeys(self._kinds, 0.0), dict.fromkeys(self._kinds, 0)
        for kind, size, square in zip(self._kinds, self._sizes, squares, strict=True):
            totals[kind] += square
            counts[kind] += size
        return {kind: math.sqrt(total / counts[kind]) for kind, total in totals.items()}

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
            UserError: a tensor is missing, or one too many, or has another shape or dtype.
        """
        expected = {
            f"{n}.{moment}" for shard in self.shards for n in shard.names for moment in shard.moment_names
        }
        for name in sorted(expected ^ state.keys()):
            problem = "is missing" if name in expected else "belongs to no parameter"
            raise UserError(f"{name} {problem}. Take a checkpoint of the same model.")
        for shard in self.shards:
            shard.load(state)
