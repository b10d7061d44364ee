"""What few seeds can tell: paired differences, how many seeds a difference needs, tests against a bar. Pure.

Runs of one seed share their initial weights and the order of their data, so variants are compared seed by
seed. With several variants the p-values are Holm's: the chance that any of the variants that do nothing is
told apart stays below `ALPHA`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

ALPHA = 0.05  # chance of a verdict where there is no difference
POWER = 0.8  # chance of a verdict where there is the difference that was asked about
CAUTION = (
    0.7  # chance that the scatter is not above its estimate, raised; at 0.5 a true 0.7 sd was found 78 %
)
MOST_SEEDS = 10_000


@dataclass(frozen=True)
class Comparison:
    """A variant against the baseline, seed by seed.

    Attributes:
        n: seeds that both have.
        difference: mean of variant minus baseline.
        stderr: standard error of that mean; NaN with one seed.
        p: two-sided, of Student's t with n - 1 degrees of freedom; NaN with one seed.
    """

    n: int
    difference: float
    stderr: float
    p: float

    @property
    def distance(self) -> float:
        """The difference in standard errors."""
        return self.difference / self.stderr if self.stderr > 0 else math.copysign(math.inf, self.difference)


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and its standard error; the latter is NaN for a single value.

    >>> mean_and_stderr([1.0, 3.0])
    (2.0, 1.0)
    """
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, math.nan
    return mean, float(np.std(values, ddof=1)) / math.sqrt(len(values))


def paired(baseline: Mapping[int, float], variant: Mapping[int, float]) -> Comparison | None:
    """Compare what two variants reached, both by seed; None where they have no seed in common."""
    seeds = sorted(baseline.keys() & variant.keys())
    if not seeds:
        return None
    differences = [variant[seed] - baseline[seed] for seed in seeds]
    mean, stderr = mean_and_stderr(differences)
    if len(seeds) == 1:
        p = math.nan
    elif stderr == 0:  # to the last digit: the same code under two names, or a shift that has no scatter
        p = 1.0 if mean == 0 else 0.0
    else:
        p = float(2 * stats.t.sf(abs(mean) / stderr, len(seeds) - 1))
    return Comparison(len(seeds), mean, stderr, p)


@dataclass(frozen=True)
class Scatter:
    """How far seeds scatter when what a variant and a seed have in common is taken out.

    Attributes:
        sd: standard deviation of a paired difference.
        degrees: of freedom of the estimate.
    """

    sd: float
    degrees: int


def scatter(results: Sequence[Mapping[int, float]]) -> Scatter | None:
    """The scatter of paired differences, pooled over all variants: residuals of variant + seed.

    Args:
        results: of each variant, by seed; seeds that not all variants have are left out.

    Returns:
        None with fewer than two variants or two common seeds.
    """
    seeds = sorted(set.intersection(*(set(each) for each in results))) if results else []
    if len(results) < 2 or len(seeds) < 2:
        return None
    table = np.array([[each[seed] for seed in seeds] for each in results])
    residuals = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    degrees = (len(results) - 1) * (len(seeds) - 1)
    return Scatter(math.sqrt(2 * float((residuals**2).sum()) / degrees), degrees)


def power(difference: float, sd: float, n: int, alpha: float = ALPHA) -> float:
    """Chance that the paired t-test of n seeds tells a true difference from zero, in either direction.

    Noncentral t: Cohen 1988, chapter 2, for differences with standard deviation `sd`.
    """
    critical = stats.t.isf(alpha / 2, n - 1)
    shift = abs(difference) / sd * math.sqrt(n)
    return float(stats.nct.sf(critical, n - 1, shift) + stats.nct.cdf(-critical, n - 1, shift))


def seeds_needed(
    difference: float, sd: float, degrees: int | None = None, alpha: float = ALPHA
) -> int | None:
    """Fewest seeds with which a true difference is found with a chance of `POWER`.

    Args:
        difference: between the means, not 0.
        sd: standard deviation of a paired difference.
        degrees: of freedom that `sd` was estimated with. A scatter from few seeds is as often too small as
            too large, and then asks for too few seeds: it is raised to its upper bound at `CAUTION`. None for
            a scatter that is known.
        alpha: of the test.

    Returns:
        None where `MOST_SEEDS` would not do.
    """
    if degrees is not None:
        sd *= math.sqrt(degrees / float(stats.chi2.ppf(1 - CAUTION, degrees)))
    low, high = 1, 2  # low is too few, high enough
    while sd > 0 and power(difference, sd, high, alpha) < POWER:
        low, high = high, 2 * high
        if high > MOST_SEEDS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(difference, sd, middle, alpha) >= POWER else (middle, high)
    return high


def detectable(sd: float, n: int, alpha: float = ALPHA) -> float:
    """The least difference that n seeds find with a chance of `POWER`."""
    low, high = 0.0, sd
    while power(high, sd, n, alpha) < POWER:
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if power(middle, sd, n, alpha) >= POWER else (middle, high)
    return high


def p_not_below(values: Sequence[float], bar: float) -> float:
    """P of the one-sided t-test that the mean, of which these are draws, is below a bar.

    Small where the values show that it is: p < 0.01 is the speedrun's rule for 3.28.
    """
    mean, stderr = mean_and_stderr(values)
    return p_of_mean(mean - bar, stderr, len(values))


def p_of_mean(above: float, stderr: float, n: int) -> float:
    """The same from a mean: how far it is above the bar, its standard error, how many values it is of."""
    if stderr == 0:
        return 0.0 if above < 0 else 1.0
    return float(stats.t.cdf(above / stderr, n - 1))


def interval(draws: NDArray[np.float64], share: float = 0.95) -> tuple[float, float]:
    """The middle of a bootstrap's draws that holds this share of them."""
    low, high = np.quantile(draws, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)
