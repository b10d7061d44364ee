"""From a step to the learning-rate multiplier, momentum and weight decay. Pure (RECIPE 1.4, 1.5, 2.4)."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """The shape of a run over its steps; made by `scaling.plan`.

    Attributes:
        steps: steps of the whole run.
        warmup_steps: steps of linear learning-rate warmup.
        warmdown_steps: last steps, over which the learning rate falls linearly.
        final_lr_frac: share of the learning rate left at the very end.
        momentum_start: Muon's momentum at step 0.
        momentum_peak: Muon's momentum after its warmup.
        momentum_warmup_steps: steps from start to peak.
        momentum_final: Muon's momentum at the end of the warmdown.
        matrix_weight_decay: weight decay of the block matrices at step 0.
        weight_decay_shape: "cosine" or "linear", both to zero.
    """

    steps: int
    warmup_steps: int
    warmdown_steps: int
    final_lr_frac: float
    momentum_start: float
    momentum_peak: float
    momentum_warmup_steps: int
    momentum_final: float
    matrix_weight_decay: float
    weight_decay_shape: str


def lr_multiplier(step: int, s: Schedule) -> float:
    """Share of the base learning rate at a step: linear up, flat, linear down to `final_lr_frac`."""
    if step < s.warmup_steps:
        return (step + 1) / s.warmup_steps
    if step <= s.steps - s.warmdown_steps:
        return 1.0
    left = (s.steps - step) / s.warmdown_steps
    return left + (1 - left) * s.final_lr_frac


def muon_momentum(step: int, s: Schedule) -> float:
    """Muon's momentum at a step: linear to its peak, then linear to its final value across the warmdown."""
    if step < s.momentum_warmup_steps:
        frac = step / s.momentum_warmup_steps
        return s.momentum_start + (s.momentum_peak - s.momentum_start) * frac
    start = s.steps - s.warmdown_steps
    if step < start or s.warmdown_steps == 0:
        return s.momentum_peak
    frac = (step - start) / s.warmdown_steps
    return s.momentum_peak + (s.momentum_final - s.momentum_peak) * frac


def muon_weight_decay(step: int, s: Schedule) -> float:
    """Weight decay of the block matrices at a step: from its base to zero at the end."""
    frac = step / s.steps
    if s.weight_decay_shape == "linear":
        return s.matrix_weight_decay * (1 - frac)
    return s.matrix_weight_decay * 0.5 * (1 + math.cos(math.pi * frac))
