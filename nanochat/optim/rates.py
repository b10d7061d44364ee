"""Optimizer interface: the rates of a step, and what every rule for block matrices provides.

A rule is one class in one file, named in MATRIX_OPTIMIZERS (config/recipes.py) and made as
rule(like, group, dtype, options) for K matrices like (K, m, n), with its moments at zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepRates:
    """Scalars of one step. They are created on the device: a host-to-device copy would synchronise.

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
    """Options of the rules for matrices beside their rates.

    Attributes:
        polar_norm_factor: Muon's safety factor on the norm before Polar Express.
        soap_every: steps between two renewals of SOAP's bases.
        soap_sides: 2, or 1 for a basis on the shorter side only; on the right of square matrices.
    """

    polar_norm_factor: float
    soap_every: int = 10
    soap_sides: int = 2


class MatrixRule(Protocol):
    """Moments of K matrices (K, m, n), each of them (K, ...), and what a step does with them."""

    moments: dict[str, Tensor]

    def update(self, params: Tensor, grads: Tensor, rates: StepRates) -> Tensor:
        """Update parameters and moments in place; (K,) sums of squares of the change."""

    def compile(self) -> None:
        """Let torch.compile make the update."""


def sum_of_squares(x: Tensor) -> Tensor:
    """(K, ...) -> (K,) fp32."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1).square()  # type: ignore[no-any-return]
