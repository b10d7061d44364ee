"""Schedules against RECIPE's formulas, worked by hand for a run of 1,000 steps."""

from __future__ import annotations

import doctest
import math

import pytest

from nanochat.config import schedule
from nanochat.config.arguments import TrainArgs
from nanochat.config.plan import plan
from nanochat.config.schedule import (
    batch_units,
    lr_multiplier,
    muon_momentum,
    muon_weight_decay,
    units_until,
    window_share,
)

JULY = plan(TrainArgs(num_iterations=1000), 32768).schedule
JANUARY = plan(TrainArgs(num_iterations=1000, recipe="nanochat-2026-01"), 32768).schedule
RACE = plan(TrainArgs(num_iterations=1000, recipe="speedrun-124m"), 50265).schedule


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


@pytest.mark.parametrize(
    ("step", "units", "share", "rate"),
    [
        (0, 1, 0.25, 1 / 40 * math.sqrt(1 / 3)),
        (39, 1, 0.25, math.sqrt(1 / 3)),
        (332, 1, 0.25, math.sqrt(1 / 3)),
        (333, 2, 0.5, math.sqrt(2 / 3)),
        (400, 2, 0.5, math.sqrt(2 / 3)),  # the warmdown takes the last 600 steps
        (666, 2, 0.5, (334 / 600 + 266 / 600 * 0.15) * math.sqrt(2 / 3)),
        (667, 3, 1.0, 333 / 600 + 267 / 600 * 0.15),
        (999, 3, 1.0, 1 / 600 + 599 / 600 * 0.15),
        (1000, 3, 1.0, 0.15),
    ],
)
def test_batch_windows_and_rate_of_the_race(step: int, units: int, share: float, rate: float) -> None:
    assert batch_units(step, RACE) == units
    assert window_share(step, RACE) == share
    assert lr_multiplier(step, RACE) == pytest.approx(rate)


def test_units_add_up_over_the_steps() -> None:
    for s in (RACE, JULY):
        for step in (0, 1, 333, 334, 700, 1000):
            assert units_until(step, s) == sum(batch_units(i, s) for i in range(step))


def test_without_stages_nothing_grows() -> None:
    assert {batch_units(step, JULY) for step in range(1000)} == {1}
    assert {window_share(step, JULY) for step in range(1000)} == {1.0}


def test_a_run_shorter_than_its_stages_ends_in_the_last_one() -> None:
    for steps in (1, 2, 3):
        s = plan(TrainArgs(num_iterations=steps, recipe="speedrun-124m"), 50265).schedule
        assert (batch_units(steps, s), window_share(steps, s)) == (3, 1.0)
        assert units_until(steps, s) == sum(batch_units(i, s) for i in range(steps))


def test_the_example_in_the_docstring_holds() -> None:
    assert doctest.testmod(schedule).failed == 0
