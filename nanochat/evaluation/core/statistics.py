"""Statistics of CORE: errors of accuracies and of their mean, paired differences, probabilities. Pure.

Examples of one passage (coqa's turns, squad's questions) are answered alike, so passages, not examples, are
the independent draws. A stratum is what is averaged with equal weight: a task, or a category of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

BOOTSTRAP_SAMPLES = 4000  # standard error of the standard error: 1.1 %
BOOTSTRAP_SEED = 0

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Stratum:
    """Values of examples (1 right, 0 wrong, or a difference of two such), added up by passage.

    Attributes:
        sums: (G,) sum of the values of each passage.
        sizes: (G,) examples of each passage.
        squares: sum of the squared values of all examples.
    """

    sums: Floats
    sizes: Floats
    squares: float

    @staticmethod
    def of(values: Sequence[float], passages: Sequence[int]) -> Stratum:
        """Add up values by the number of their passage."""
        _, group = np.unique(np.asarray(passages), return_inverse=True)
        numbers = np.asarray(values, np.float64)
        sums, sizes = np.bincount(group, numbers), np.bincount(group)
        return Stratum(sums.astype(float), sizes.astype(float), float((numbers**2).sum()))

    @staticmethod
    def by_category(rows: Iterable[tuple[float, int, str]]) -> list[Stratum]:
        """One of each category, in the order of their first examples; rows are (value, passage, category)."""
        members: dict[str, list[tuple[float, int]]] = {}
        for value, passage, category in rows:
            members.setdefault(category, []).append((value, passage))
        return [Stratum.of(*zip(*pairs, strict=True)) for pairs in members.values()]

    @property
    def mean(self) -> float:
        """Mean over examples."""
        return float(self.sums.sum() / self.sizes.sum())

    @property
    def variance(self) -> float:
        """Variance of the mean.

        With one example a passage, and with one passage, it is that of independent examples, which for
        0 and 1 is the binomial p (1 - p) / n. Otherwise that of clusters, with the factor G / (G - 1) for
        the mean being estimated.
        """
        n, groups = float(self.sizes.sum()), len(self.sizes)
        if groups in (1, n):
            return max(0.0, self.squares / n - self.mean**2) / n
        residuals = self.sums - self.mean * self.sizes
        return float(groups / (groups - 1) * (residuals**2).sum() / n**2)

    def resampled(self, rng: np.random.Generator, samples: int) -> Floats:
        """Means (samples,) of passages drawn with replacement."""
        groups = len(self.sizes)
        if groups == self.sizes.sum() and set(np.unique(self.sums)) <= {0.0, 1.0}:
            return rng.binomial(groups, self.mean, samples) / groups  # the same distribution, at once
        means = np.empty(samples)
        for first in range(0, samples, 100):
            drawn = rng.integers(groups, size=(min(100, samples - first), groups))
            means[first : first + 100] = self.sums[drawn].sum(axis=1) / self.sizes[drawn].sum(axis=1)
        return means


def mean_of(strata: Sequence[Stratum]) -> float:
    """Plain mean of the strata's means."""
    return sum(stratum.mean for stratum in strata) / len(strata)


def stderr_of_mean(strata: Sequence[Stratum]) -> float:
    """Standard error of that mean."""
    return math.sqrt(sum(stratum.variance for stratum in strata)) / len(strata)


def bootstrap(tasks: Sequence[Sequence[Stratum]], scales: Sequence[float]) -> Floats:
    """CORE, up to a constant, of `BOOTSTRAP_SAMPLES` resamplings of the examples.

    Args:
        tasks: the strata of each.
        scales: 1 / (1 - baseline) of each task.
    """
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    total = np.zeros(BOOTSTRAP_SAMPLES)
    for strata, scale in zip(tasks, scales, strict=True):
        means = sum(stratum.resampled(rng, BOOTSTRAP_SAMPLES) for stratum in strata)
        total += scale * np.asarray(means) / len(strata)
    return total / len(tasks)


def probability_above(value: float, stderr: float, bar: float, degrees: int | None = None) -> float:
    """How probable it is that what was measured with an error lies above a bar.

    Args:
        value: the measurement.
        stderr: its standard error.
        bar: what to be above, taken as exact.
        degrees: of freedom, where the error was estimated from so few values (n - 1); None for a normal one.

    >>> round(probability_above(1.96, 1.0, 0.0), 3), probability_above(1.0, 0.0, 2.0)
    (0.975, 0.0)
    """
    if stderr == 0:
        return 0.5 if value == bar else float(value > bar)
    distance = (value - bar) / stderr
    return NormalDist().cdf(distance) if degrees is None else student_cdf(distance, degrees)


def student_cdf(t: float, degrees: int) -> float:
    """Probability that Student's t lies below t (Abramowitz and Stegun 26.7.3 and 26.7.4).

    >>> round(student_cdf(2.920, 2), 4), round(student_cdf(-3.182, 3), 4), student_cdf(0.0, 5)
    (0.95, 0.025, 0.5)
    """
    angle = math.atan2(t, math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(2 + odd, degrees - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return 0.5 + inside / 2


def exact_mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p of the exact McNemar test, for few pairs that differ: a coin thrown once for each.

    >>> exact_mcnemar(0, 5), round(exact_mcnemar(8, 1), 4), exact_mcnemar(3, 3), exact_mcnemar(0, 0)
    (0.0625, 0.0391, 1.0, 1.0)
    """
    n, few = only_first + only_second, min(only_first, only_second)
    return min(1.0, 2 * math.fsum(math.comb(n, k) for k in range(few + 1)) / 2.0**n)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for being several (Holm 1979); NaN is left out and stays.

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    order = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    adjusted = list(p_values)
    highest = 0.0
    for rank, (p, i) in enumerate(order):
        highest = max(highest, min(1.0, p * (len(order) - rank)))
        adjusted[i] = highest
    return adjusted


def wilson(fraction: float, n: float, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of a fraction of n draws (Wilson 1927), which is not a point where it is 0 or 1.

    >>> [round(end, 3) for end in wilson(0.0, 32)], [round(end, 3) for end in wilson(0.5, 100)]
    ([0.0, 0.107], [0.404, 0.596])
    """
    middle = (fraction + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(fraction * (1 - fraction) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def degrees_of_sum(estimated: float, known: float, degrees: int) -> int | None:
    """Degrees of freedom of a variance that is the sum of an estimated one and a known one (Welch 1947).

    None where the estimated one weighs nothing: the sum is known.

    >>> degrees_of_sum(1.0, 0.0, 2), degrees_of_sum(1.0, 1.0, 2), degrees_of_sum(0.0, 1.0, 2)
    (2, 8, None)
    """
    return int(degrees * ((estimated + known) / estimated) ** 2) if estimated > 0 else None
