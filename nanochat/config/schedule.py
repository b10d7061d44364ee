"""Schedules: learning rate, momentum, weight decay, batch and windows as functions of the step.

Pure functions of (step, schedule), so that a resumed run continues them exactly. Formulas: docs/recipe.md
(RECIPE 1.4, 1.5, 2.4, 3.3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

Value = TypeVar("Value")


@dataclass(frozen=True)
class Schedule:
    """The shape of a run over its steps; made by `config.plan.plan`.

    Attributes:
        steps: steps of the whole run.
        warmup_steps: steps of linear learning-rate warmup.
        warmdown_steps: last steps, over which the learning rate falls linearly.
        final_lr_frac: fraction of the learning rate left at the very end.
        momentum_start: Muon's momentum at step 0.
        momentum_peak: Muon's momentum after its warmup.
        momentum_warmup_steps: steps from start to peak.
        momentum_final: Muon's momentum at the end of the warmdown.
        matrix_weight_decay: weight decay of the block matrices at step 0.
        weight_decay_shape: "cosine" or "linear", both to zero.
        batch_stages: (first step, units) of each stage of a batch that grows; a unit is `Plan.batch_rows`
            rows. Without stages a batch is one unit throughout.
        window_stages: (first step, fraction) of each stage of attention windows that grow: every layer has
            this fraction of its own. Without stages it has all of it.
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
    batch_stages: tuple[tuple[int, int], ...] = ()
    window_stages: tuple[tuple[int, float], ...] = ()


def lr_multiplier(step: int, s: Schedule) -> float:
    """Factor on the base learning rates at a step: linear up, flat, linear down to `final_lr_frac`.

    A batch smaller than the largest lowers it by the square root of their ratio.
    """
    return _trapezoid(step, s) * math.sqrt(batch_units(step, s) / most_units(s))


def _trapezoid(step: int, s: Schedule) -> float:
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


def batch_units(step: int, s: Schedule) -> int:
    """Units of the batch of a step."""
    return _at(step, s.batch_stages, 1)


def most_units(s: Schedule) -> int:
    """Units of the largest batch."""
    return max((units for _, units in s.batch_stages), default=1)


def units_until(step: int, s: Schedule) -> int:
    """Units of all batches before a step.

    >>> s = Schedule(9, 0, 0, 0.0, 0.0, 0.0, 0, 0.0, 0.0, "linear", batch_stages=((0, 1), (3, 2), (6, 4)))
    >>> [units_until(step, s) for step in (0, 3, 4, 9)]
    [0, 3, 5, 21]
    """
    stages = s.batch_stages or ((0, 1),)
    ends = [*(first for first, _ in stages[1:]), s.steps]
    return sum(
        units * max(0, min(step, end) - first) for (first, units), end in zip(stages, ends, strict=True)
    )


def window_share(step: int, s: Schedule) -> float:
    """Fraction of its own attention window that every layer has at a step."""
    return _at(step, s.window_stages, 1.0)


def _at(step: int, stages: tuple[tuple[int, Value], ...], otherwise: Value) -> Value:
    """The value of the last stage that has begun."""
    return next((value for first, value in reversed(stages) if first <= step), otherwise)
