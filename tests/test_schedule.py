"""Schedules against RECIPE's formulas, worked by hand for a run of 1,000 steps."""

from __future__ import annotations

import math

import pytest

from nanochat.config import TrainArgs
from nanochat.scaling import plan
from nanochat.schedule import lr_multiplier, muon_momentum, muon_weight_decay

JULY = plan(TrainArgs(num_iterations=1000), 32768).schedule
JANUARY = plan(TrainArgs(num_iterations=1000, recipe="january"), 32768).schedule


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 1 / 40),
        (19, 0.5),
        (39, 1.0),
        (350, 1.0),  # the warmdown takes the last 650 steps
        (675, 0.5 + 0.5 * 0.05),
        (999, 1 / 650 + 649 / 650 * 0.05),
    ],
)
def test_july_learning_rate(step: int, expected: float) -> None:
    assert lr_multiplier(step, JULY) == pytest.approx(expected)


@pytest.mark.parametrize(("step", "expected"), [(0, 1), (500, 1), (750, 0.5), (999, 1 / 500)])
def test_january_learning_rate(step: int, expected: float) -> None:
    assert lr_multiplier(step, JANUARY) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.85), (200, 0.91), (400, 0.97 - 0.07 * 50 / 650), (675, 0.935)]
)
def test_july_momentum(step: int, expected: float) -> None:
    assert muon_momentum(step, JULY) == pytest.approx(expected)


@pytest.mark.parametrize(("step", "expected"), [(0, 0.85), (150, 0.90), (300, 0.95), (999, 0.95)])
def test_january_momentum(step: int, expected: float) -> None:
    assert muon_momentum(step, JANUARY) == pytest.approx(expected)


@pytest.mark.parametrize("step", [0, 250, 500, 999])
def test_weight_decay_shapes(step: int) -> None:
    assert muon_weight_decay(step, JULY) == pytest.approx(0.28 * (1 + math.cos(math.pi * step / 1000)) / 2)
    assert muon_weight_decay(step, JANUARY) == pytest.approx(0.2 * (1 - step / 1000))


def test_one_step_run_has_finite_schedules() -> None:
    for ratio in (0.0, 0.65, 1.0):
        s = plan(TrainArgs(num_iterations=1, warmdown_ratio=ratio), 32768).schedule
        assert all(math.isfinite(f(0, s)) for f in (lr_multiplier, muon_momentum, muon_weight_decay))
