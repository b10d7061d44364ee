"""Errors against simulation: how often the 95 % interval holds the truth."""

import doctest
import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from nanochat.evaluation.core import statistics as core_statistics
from nanochat.evaluation.core.statistics import Stratum


def share_of_intervals_that_hold(estimates, errors, truth):
    return np.mean(np.abs(np.asarray(estimates) - truth) < 1.96 * np.asarray(errors))


def test_the_error_of_independent_answers_is_binomial():
    stratum = Stratum.of([1, 0, 1, 1, 0], range(5))
    assert stratum.variance == pytest.approx(0.6 * 0.4 / 5)


def test_the_error_of_passages_by_hand():
    # Two passages of 2 and one of 1; sums 2, 0, 1; mean 3/5; residuals 0.8, -1.2, 0.4.
    stratum = Stratum.of([1, 1, 0, 0, 1], [7, 7, 3, 3, 9])
    assert stratum.mean == pytest.approx(0.6)
    assert stratum.variance == pytest.approx(3 / 2 * (0.64 + 1.44 + 0.16) / 25)
    # One passage says nothing of the spread between passages: as if its examples were independent.
    assert Stratum.of([1, 0, -1, 0], [4] * 4).variance == pytest.approx(0.5 / 4)


@pytest.mark.parametrize(("examples", "accuracy"), [(100, 0.6), (273, 0.58), (1172, 0.22), (5153, 0.32)])
def test_the_interval_of_a_task_holds_the_truth_95_times_of_100(examples, accuracy):
    rng = np.random.default_rng(1)
    hits = rng.random((4000, examples)) < accuracy
    strata = [Stratum.of(row, range(examples)) for row in hits[:2000]]
    means, errors = [s.mean for s in strata], [math.sqrt(s.variance) for s in strata]
    assert 0.93 <= share_of_intervals_that_hold(means, errors, accuracy) <= 0.97


def clustered_answers(rng, passages, per_passage, accuracy, spread):
    """Answers whose passages are easy or hard: passage accuracies are beta distributed around `accuracy`."""
    own = rng.beta(accuracy / spread, (1 - accuracy) / spread, passages)
    sizes = rng.integers(1, 2 * per_passage, passages)
    number = np.repeat(np.arange(passages), sizes)
    return (rng.random(len(number)) < own[number]).astype(float), number


def test_the_interval_of_passages_holds_the_truth_and_the_binomial_one_does_not():
    """Like coqa: hundreds of stories with about sixteen turns each."""
    rng = np.random.default_rng(2)
    strata, binomial = [], []
    for _ in range(1500):
        values, passages = clustered_answers(rng, 200, 16, 0.3, 0.2)
        strata.append(Stratum.of(values, passages))
        binomial.append(Stratum.of(values, range(len(values))))
    means = [s.mean for s in strata]
    assert 0.93 <= share_of_intervals_that_hold(means, [math.sqrt(s.variance) for s in strata], 0.3) <= 0.97
    assert share_of_intervals_that_hold(means, [math.sqrt(s.variance) for s in binomial], 0.3) < 0.85


def test_the_interval_of_core_holds_the_truth_95_times_of_100():
    """Tasks of very different sizes, one of them of passages, baselines of 0 to 62 %."""
    rng = np.random.default_rng(3)
    sizes = [100, 273, 32, 230, 500, 1172, 2376, 1838, 210]
    truths = [0.6, 0.58, 0.06, 0.25, 0.3, 0.26, 0.55, 0.7, 0.12]
    scales = [1 / (1 - b) for b in (0.5, 0.5, 0, 0.25, 0.25, 0.25, 0.25, 0.5, 0)] + [1 / 0.38]
    covered, kept = 0, 0
    for trial in range(800):
        tasks = [[Stratum.of(rng.random(n) < p, range(n))] for n, p in zip(sizes, truths, strict=True)]
        tasks.append([Stratum.of(*clustered_answers(rng, 150, 6, 0.3, 0.2))])
        value = sum(s * t[0].mean for s, t in zip(scales, tasks, strict=True)) / 10
        variance = sum(s**2 * t[0].variance for s, t in zip(scales, tasks, strict=True)) / 100
        truth = sum(s * p for s, p in zip(scales, [*truths, 0.3], strict=True)) / 10
        covered += abs(value - truth) < 1.96 * math.sqrt(variance)
        if trial < 5:  # the bootstrap gives the same error
            spread = core_statistics.bootstrap(tasks, scales).std(ddof=1)
            assert spread == pytest.approx(math.sqrt(variance), rel=0.06)
            kept += 1
    assert kept == 5
    assert 0.93 <= covered / 800 <= 0.97


def test_the_paired_error_of_two_runs_is_smaller_than_that_of_two_samples_and_right():
    rng = np.random.default_rng(4)
    estimates, errors = [], []
    for _ in range(2000):
        easy = rng.random(400)
        one, two = (easy + 0.3 * rng.standard_normal(400) < cut for cut in (0.5, 0.55))
        stratum = Stratum.of(two.astype(float) - one, range(400))
        estimates.append(stratum.mean)
        errors.append(math.sqrt(stratum.variance))
    truth = np.mean(estimates)
    assert 0.93 <= share_of_intervals_that_hold(estimates, errors, truth) <= 0.97
    assert np.mean(errors) < 0.8 * math.sqrt(2 * 0.25 / 400)


def test_students_distribution_is_that_of_the_tables_and_of_simulation():
    for degrees, t in [(1, 6.314), (2, 2.920), (3, 2.353), (4, 2.132), (9, 1.833), (30, 1.697)]:
        assert core_statistics.student_cdf(t, degrees) == pytest.approx(0.95, abs=1e-4)
        assert core_statistics.student_cdf(-t, degrees) == pytest.approx(0.05, abs=1e-4)
    samples = np.random.default_rng(5).standard_normal((40_000, 4))
    ratio = samples.mean(axis=1) / (samples.std(axis=1, ddof=1) / 2)
    assert np.mean(ratio < 1.0) == pytest.approx(core_statistics.student_cdf(1.0, 3), abs=0.01)


def test_few_seeds_are_less_sure_than_the_normal_distribution_says():
    few = core_statistics.probability_above(0.26, 0.005, 0.25, degrees=2)
    assert few < core_statistics.probability_above(0.26, 0.005, 0.25)


def test_examples_in_the_docstrings_hold():
    results = doctest.testmod(core_statistics)
    assert (results.attempted, results.failed) == (6, 0)


@pytest.mark.parametrize(("right", "n"), [(0, 32), (32, 32), (1, 100), (37, 100), (0, 1)])
def test_the_interval_of_a_share_is_scipys(right, n):
    theirs = scipy_stats.binomtest(right, n).proportion_ci(method="wilson")
    assert core_statistics.wilson(right / n, n) == pytest.approx((theirs.low, theirs.high), abs=1e-6)
