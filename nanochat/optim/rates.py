"""The rates of a step, and what the optimizers of block matrices have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


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


def sum_of_squares(x: Tensor) -> Tensor:
    """(K, ...) -> (K,) fp32."""
    norms: Tensor = torch.linalg.vector_norm(x.flatten(1), dim=1)
    return norms.square()
