"""The optimizers of block matrices as objects: the moments of K matrices of one shape, and their update."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nanochat.config.plan import GroupPlan
from nanochat.optim.adamw import AdamRates, adamw_update, muon_update
from nanochat.optim.soap import Side, find_basis, renew_basis, soap_update


@dataclass(frozen=True)
class StepRates:
    """Scalars of one step. Tensors are filled on the device: copied there, they would be waited for.

    Attributes:
        index: steps of the run before this one.
        lr_mult: factor of the schedule on every learning rate.
        weight_decay: of the matrices.
        lr_mult_tensor: lr_mult, 0-dim.
        momentum_tensor: Muon's momentum, 0-dim.
        weight_decay_tensor: weight_decay, 0-dim.
        ok: 0-dim bool; where it is False nothing changes.
    """

    index: int
    lr_mult: float
    weight_decay: float
    lr_mult_tensor: Tensor
    momentum_tensor: Tensor
    weight_decay_tensor: Tensor
    ok: Tensor


@dataclass(frozen=True)
class MatrixOptions:
    """What is chosen of the rules for matrices beside their rates.

    Attributes:
        soap_every: steps between two renewals of SOAP's bases.
        soap_sides: 2, or 1 for a basis on the shorter side only; on the right of square matrices.
    """

    soap_every: int = 10
    soap_sides: int = 2


DEFAULTS = MatrixOptions()


class MatrixRule(Protocol):
    """Moments of K matrices (K, m, n), each of them (K, ...), and what a step does with them."""

    moments: dict[str, Tensor]

    def update(self, params: Tensor, grads: Tensor, rates: StepRates) -> Tensor:
        """Update parameters and moments in place; (K,) sums of squares of the change."""

    def compile(self) -> None:
        """Let torch.compile make the update."""


def matrix_rule(
    like: Tensor, group: GroupPlan, dtype: torch.dtype, norm_factor: float, options: MatrixOptions
) -> MatrixRule:
    """The rule that the group names, with moments at zero for matrices like (K, m, n)."""
    if group.optimizer == "soap":
        return _Soap(like, group, options)
    if group.optimizer == "adamw":
        return _Adam(like, group)
    assert group.optimizer == "muon", group.optimizer
    return _Muon(like, group, dtype, norm_factor)


class _Muon:
    """Muon, whose learning rate is multiplied by sqrt(max(1, m / n))."""

    def __init__(self, like: Tensor, group: GroupPlan, dtype: torch.dtype, norm_factor: float) -> None:
        self.group, self.dtype, self.norm_factor = group, dtype, norm_factor
        self.function = muon_update
        count, m, n = like.shape
        self.lr = group.lr * math.sqrt(max(1.0, m / n))
        second_moment = like.new_zeros(count, *((m, 1) if m >= n else (1, n)))
        self.moments = {"momentum": torch.zeros_like(like), "second_moment": second_moment}

    def update(self, params: Tensor, grads: Tensor, rates: StepRates) -> Tensor:
        return self.function(
            params,
            grads,
            *self.moments.values(),
            lr=rates.lr_mult_tensor * self.lr,
            momentum=rates.momentum_tensor,
            weight_decay=rates.weight_decay_tensor,
            beta2=self.group.beta2,
            ok=rates.ok,
            dtype=self.dtype,
            norm_factor=self.norm_factor,
        )

    def compile(self) -> None:
        self.function = torch.compile(muon_update, dynamic=False)


class _Soap:
    """SOAP. Step 0 only finds the bases; every `soap_every` steps they are renewed.

    A matrix that had no gradient at step 0, or a run whose step 0 was held back, gets its bases from an
    eigendecomposition at the first renewal.
    """

    def __init__(self, like: Tensor, group: GroupPlan, options: MatrixOptions) -> None:
        self.group, self.every = group, options.soap_every
        self.function = soap_update
        count, m, n = like.shape
        self.moments = {
            "exp_avg": torch.zeros_like(like),
            "exp_avg_sq": torch.zeros_like(like),
            "step": like.new_zeros(count),
        }
        self.sides = []
        for name, dim, size, other in (("left", -2, m, n), ("right", -1, n, m)):
            if options.soap_sides == 1 and (size > other or (size == other and name == "left")):
                continue
            gram = like.new_zeros(count, size, size)
            basis = torch.eye(size, dtype=like.dtype, device=like.device).repeat(count, 1, 1)
            self.moments |= {f"{name}_gram": gram, f"{name}_basis": basis}
            self.sides.append(Side(dim, gram, basis))

    def update(self, params: Tensor, grads: Tensor, rates: StepRates) -> Tensor:
        if rates.index == 0:
            grads = torch.where(rates.ok, grads, 0.0)
            for side in self.sides:
                side.observe(grads, rates.ok.to(grads.dtype) * (1 - self.group.beta2))
                find_basis(side, rates.ok)
            return params.new_zeros(len(params))
        squares = self.function(
            params,
            grads,
            self.moments["exp_avg"],
            self.moments["exp_avg_sq"],
            self.moments["step"],
            self.sides,
            lr=rates.lr_mult_tensor * self.group.lr,
            weight_decay=rates.weight_decay_tensor,
            beta1=self.group.beta1,
            beta2=self.group.beta2,
            eps=self.group.eps,
            ok=rates.ok,
        )
        if rates.index == self.every:
            for side in self.sides:
                find_basis(side, rates.ok)
        if rates.index % self.every == 0:
            for side in self.sides:
                renew_basis(side, self.moments["exp_avg_sq"], rates.ok)
        return squares

    def compile(self) -> None:
        self.function = torch.compile(soap_update, dynamic=False)


class _Adam:
    """AdamW, with the weight decay of the schedule."""

    def __init__(self, like: Tensor, group: GroupPlan) -> None:
        self.group = group
        self.moments = {
            "exp_avg": torch.zeros_like(like),
            "exp_avg_sq": torch.zeros_like(like),
            "step": like.new_zeros(len(like)),
        }

    def update(self, params: Tensor, grads: Tensor, rates: StepRates) -> Tensor:
        group = self.group
        adam = AdamRates(group.lr * rates.lr_mult, group.beta1, group.beta2, group.eps, rates.weight_decay)
        matrices = zip(params, grads, *self.moments.values(), strict=True)
        return torch.cat([adamw_update(*tensors, rates=adam, ok=rates.ok) for tensors in matrices])

    def compile(self) -> None:
        """Nothing: it is one kernel already."""
