"""The statistics of the bench, against scipy, published tables and simulated experiments."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from dev import stats
from nanochat.evaluation.core import statistics as core_statistics


def by_seed(values: np.ndarray) -> dict[int, float]:
    return dict(enumerate(values.tolist()))


def test_the_paired_test_is_that_of_scipy() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 5))
    ours = stats.paired(by_seed(a), by_seed(b))
    theirs = scipy_stats.ttest_rel(b, a)
    assert ours is not None
    assert ours.n == 5
    assert ours.p == pytest.approx(theirs.pvalue, rel=1e-9)
    assert ours.distance == pytest.approx(theirs.statistic, rel=1e-9)


def test_only_seeds_that_both_have_are_compared() -> None:
    found = stats.paired({0: 1.0, 1: 2.0, 7: 50.0}, {1: 2.5, 0: 1.3, 3: -9.0})
    assert found is not None
    assert found.n == 2
    assert found.difference == pytest.approx(0.4)
    assert found.stderr == pytest.approx(0.1)  # of 0.3 and 0.5
    assert found.p == pytest.approx(2 * (0.5 - math.atan(4) / math.pi))  # Student with one degree is Cauchy
    assert stats.paired({0: 1.0}, {1: 1.0}) is None


def test_one_seed_gives_a_difference_and_no_verdict() -> None:
    found = stats.paired({0: 1.0}, {0: 3.0})
    assert found is not None
    assert found.difference == 2.0
    assert math.isnan(found.p)
    assert math.isnan(found.stderr)


def test_the_same_run_twice_is_never_told_apart() -> None:
    found = stats.paired({0: 1.25, 1: 1.5}, {0: 1.25, 1: 1.5})
    assert found is not None
    assert found.p == 1.0


def test_adjusted_p_values_are_those_worked_by_hand() -> None:
    # sorted .005 .01 .03 .04 times 4, 3, 2, 1, and none below the one before it
    assert core_statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    adjusted = core_statistics.holm([math.nan, 0.02, 0.9])
    assert math.isnan(adjusted[0])
    assert adjusted[1:] == pytest.approx([0.04, 0.9])


@pytest.mark.parametrize(("effect", "seeds"), [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10), (1.5, 6)])
def test_the_seeds_asked_for_are_those_of_the_published_tables(effect: float, seeds: int) -> None:
    """Paired t-test, two-sided 5 %, power 80 %: G*Power 3.1."""
    assert stats.seeds_needed(effect, 1.0) == seeds
    assert stats.seeds_needed(effect * 0.003, 0.003) == seeds


def test_the_power_is_that_of_simulated_experiments() -> None:
    rng = np.random.default_rng(2)
    draws = rng.normal(1.0, 1.0, size=(40_000, 6))
    found = scipy_stats.ttest_1samp(draws, 0.0, axis=1).pvalue < stats.ALPHA
    assert stats.power(1.0, 1.0, 6) == pytest.approx(found.mean(), abs=0.01)  # 4 standard errors


def test_what_seeds_can_detect_is_the_inverse_of_the_seeds_needed() -> None:
    least = stats.detectable(0.01, 5)
    assert stats.seeds_needed(least * 1.001, 0.01) == 5
    assert stats.seeds_needed(least * 0.999, 0.01) == 6


def test_a_difference_too_small_for_any_number_of_seeds_is_said_to_be() -> None:
    assert stats.seeds_needed(1e-6, 1.0) is None


def test_the_scatter_is_of_paired_differences_and_leaves_out_what_seeds_share() -> None:
    rng = np.random.default_rng(3)
    a = rng.normal(0.0, 0.01, size=400)
    luck = rng.normal(0.0, 5.0, size=400)  # of a seed, the same in all variants
    results = [by_seed(luck + a), by_seed(luck + 3 + rng.normal(0.0, 0.01, size=400))]
    found = stats.scatter(results)
    assert found is not None
    assert found.degrees == 399
    assert found.sd == pytest.approx(0.01 * math.sqrt(2), rel=0.12)
    differences = [results[1][seed] - results[0][seed] for seed in range(400)]
    assert found.sd == pytest.approx(np.std(differences, ddof=1), rel=1e-9)
    assert stats.scatter([{0: 1.0}, {0: 2.0}]) is None
    assert stats.scatter([]) is None


def verdicts(rng: np.random.Generator, variants: int, seeds: int) -> list[bool]:
    """Whether each of some variants that do nothing was told apart from the first, once."""
    luck = rng.normal(0.0, 0.01, size=seeds)  # data and initial weights, that variants of a seed share
    runs = [by_seed(3.0 + luck + rng.normal(0.0, 0.01, size=seeds)) for _ in range(variants)]
    compared = [stats.paired(runs[0], run) for run in runs[1:]]
    return [p < stats.ALPHA for p in core_statistics.holm([c.p for c in compared if c is not None])]


@pytest.mark.parametrize(("variants", "seeds"), [(2, 3), (2, 8), (9, 3)])
def test_variants_that_are_the_same_are_told_apart_in_at_most_5_percent(variants: int, seeds: int) -> None:
    """30 times 100 experiments: one hundred alone would have more than 5 in four of ten cases, by chance."""
    rng = np.random.default_rng(4)
    trials = 3000
    wrong = sum(any(verdicts(rng, variants, seeds)) for _ in range(trials))
    margin = 3 * math.sqrt(0.05 * 0.95 / trials)
    assert wrong / trials <= 0.05 + margin
    if variants == 2:  # and the test is not merely shy
        assert wrong / trials >= 0.05 - margin


@pytest.mark.parametrize("variants", [2, 4])
def test_a_variant_worse_by_two_standard_deviations_is_found_with_the_seeds_asked_for(variants: int) -> None:
    """A pilot of three seeds gives the scatter, the scatter the number of seeds, these the verdict."""
    rng = np.random.default_rng(5)
    worse = 2 * 0.01
    found, asked = 0, []
    trials = 300
    for _ in range(trials):
        luck, own = rng.normal(0.0, 0.01, size=400), rng.normal(0.0, 0.01, size=(variants, 400))
        runs = 3.0 + luck + own
        runs[-1] += worse
        pilot = stats.scatter([by_seed(run[:3]) for run in runs])
        assert pilot is not None
        seeds = stats.seeds_needed(worse, pilot.sd, pilot.degrees)
        assert seeds is not None
        asked.append(min(400, max(3, seeds)))
        comparison = stats.paired(by_seed(runs[0][: asked[-1]]), by_seed(runs[-1][: asked[-1]]))
        assert comparison is not None
        found += comparison.p < stats.ALPHA and comparison.difference > 0
    assert found / trials >= 0.8
    assert np.median(asked) <= 15  # and it does not ask for the moon: 7 where the scatter is known


def test_the_one_sided_test_is_that_of_scipy() -> None:
    losses = [3.2791, 3.2776, 3.2801, 3.2785]
    theirs = scipy_stats.ttest_1samp(losses, 3.28, alternative="less").pvalue
    assert stats.p_not_below(losses, 3.28) == pytest.approx(theirs, rel=1e-9)
