"""The fits of a scaling analysis: a parabola a budget, power laws of its lowest points, intervals. Pure.

For each budget a parabola is fitted to validation bpb over ln N, N being the scaling parameters (the matrices
of the blocks and the head); its lowest point is the best N. Straight lines through the best points in
logarithms give N ~ C^a and tokens D ~ C^b (Hoffmann et al. 2022, approach 2).

Intervals hold 95 % and are those of a parametric bootstrap: the scatter about the parabolas, pooled over
budgets, is drawn again 4,000 times, with the uncertainty of its own size (Student's), and all is fitted anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dev import stats
from nanochat.common.errors import UserError

Floats = NDArray[np.float64]

DRAWS = 4000
SEED = 0
SAME_BUDGET = 1e-6  # relative
MOST_FLAT = 0.05  # share of draws without a lowest point, above which no interval is given


@dataclass(frozen=True)
class Trained:
    """A run of the sweep: its budget in FLOPs, scaling parameters, tokens, validation bpb."""

    budget: float
    params: float
    tokens: float
    bpb: float


@dataclass(frozen=True)
class Budget:
    """The runs of one budget, in logarithms, and the parabola through them.

    Attributes:
        flops: of each of its runs.
        x: (n,) ln N.
        y: (n,) bpb.
        coefficients: of 1, x and x^2 about the middle of x, `middle`.
        tokens: of 1, x and x^2 likewise, for ln D.
    """

    flops: float
    x: Floats
    y: Floats
    middle: float
    coefficients: Floats
    tokens: Floats

    @staticmethod
    def of(runs: Sequence[Trained]) -> Budget:
        """Fit a parabola.

        Raises:
            UserError: fewer than three sizes.
        """
        x = np.log([run.params for run in runs]).astype(np.float64)
        if (sizes := len(set(x.tolist()))) < 3:
            raise UserError(
                f"budget {runs[0].budget:g}: runs of {sizes} sizes, a parabola needs three or more. "
                "Train other depths too."
            )
        middle = float(x.mean())
        solve = _solver(x - middle)
        y = np.array([run.bpb for run in runs])
        tokens: Floats = solve @ np.log([run.tokens for run in runs])
        return Budget(runs[0].budget, x, y, middle, solve @ y, tokens)

    @property
    def fitted(self) -> Floats:
        """(n,) the parabola at the runs."""
        return self.at(self.x)

    def at(self, x: Floats) -> Floats:
        """The parabola at these ln N."""
        bpb: Floats = _powers(x - self.middle) @ self.coefficients
        return bpb

    def drawn(self, noise: Floats) -> Floats:
        """(draws, 3) coefficients when other scatter (draws, n) lies on the parabola."""
        solve = _solver(self.x - self.middle)
        coefficients: Floats = (self.fitted + noise) @ solve.T
        return coefficients

    def best(self, coefficients: Floats) -> Floats:
        """Of parabolas (..., 3) the lowest points (..., 2) as ln N and ln D; NaN where there is none."""
        curvature = coefficients[..., 2]
        with np.errstate(divide="ignore", invalid="ignore"):
            x = np.where(curvature > 0, -coefficients[..., 1] / (2 * curvature), math.nan)
        return np.stack((x + self.middle, _powers(x) @ self.tokens), axis=-1)

    @property
    def is_inside(self) -> bool:
        """Whether the lowest point lies between the smallest and the largest model tried."""
        return bool(self.x.min() < self.best(self.coefficients)[0] < self.x.max())


def _powers(x: Floats) -> Floats:
    """(..., 3): 1, x, x^2."""
    return np.stack((np.ones_like(x), x, x * x), axis=-1)


def _solver(x: Floats) -> Floats:
    """(3, n): what gives the coefficients of the parabola through values at x (n,)."""
    return np.linalg.pinv(_powers(x)).astype(np.float64)


@dataclass(frozen=True)
class Estimate:
    """A figure with the interval that holds it in 95 % of the cases; None where the runs do not tell."""

    value: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Optimum:
    """The best size for a budget: N, D, D / N and the bpb there."""

    budget: Budget
    params: Estimate
    tokens: Estimate
    ratio: Estimate
    bpb: float


@dataclass(frozen=True)
class Laws:
    """What a sweep says.

    Attributes:
        optima: of the budgets whose best size was among those tried, by budget.
        left_out: the other budgets.
        params_exponent: a of N ~ C^a; None with a single optimum.
        tokens_exponent: b of D ~ C^b.
        ratio: D / N, geometric mean over the optima.
        scatter: standard deviation of bpb about the parabolas; None where every parabola meets its runs.
    """

    optima: tuple[Optimum, ...]
    left_out: tuple[Budget, ...]
    params_exponent: Estimate | None
    tokens_exponent: Estimate | None
    ratio: Estimate
    scatter: float | None


def by_budget(runs: Sequence[Trained]) -> list[Budget]:
    """A parabola for each budget, in their order.

    Raises:
        UserError: a budget with fewer than three sizes.
    """
    groups: list[list[Trained]] = []
    for run in sorted(runs, key=lambda run: run.budget):
        if groups and run.budget <= groups[-1][0].budget * (1 + SAME_BUDGET):
            groups[-1].append(run)
        else:
            groups.append([run])
    return [Budget.of(group) for group in groups]


def analyse(runs: Sequence[Trained]) -> Laws:
    """Fit all.

    Raises:
        UserError: a budget with fewer than three sizes, or none whose best size was among those tried.
    """
    fits = by_budget(runs)
    used = [fit for fit in fits if fit.is_inside]
    if not used:
        raise UserError(
            "no budget has its best size between the smallest and the largest tried. Train smaller and "
            "larger depths."
        )
    degrees = sum(len(fit.x) - 3 for fit in fits)
    squares = sum(float(((fit.y - fit.fitted) ** 2).sum()) for fit in fits)
    scatter = math.sqrt(squares / degrees) if degrees else None
    best = np.stack([fit.best(fit.coefficients) for fit in used])  # (budgets, 2)
    draws = None if scatter is None else _draws(used, scatter, degrees)  # (draws, budgets, 2)

    def estimate(figure: Callable[[Floats], Floats]) -> Estimate:
        """A figure of the best points, and its interval from those drawn."""
        interval = None
        if draws is not None:
            with np.errstate(over="ignore"):
                drawn = figure(draws)
            told = np.isfinite(drawn)  # a parabola that is nearly flat has its lowest point anywhere
            interval = stats.interval(drawn[told]) if told.mean() >= 1 - MOST_FLAT else None
        return Estimate(float(figure(best)), interval)

    def of_budget(i: int) -> Optimum:
        return Optimum(
            budget=used[i],
            params=estimate(lambda points: np.exp(points[..., i, 0])),
            tokens=estimate(lambda points: np.exp(points[..., i, 1])),
            ratio=estimate(lambda points: np.exp(points[..., i, 1] - points[..., i, 0])),
            bpb=float(used[i].at(best[i, :1])[0]),
        )

    log_flops = np.log([fit.flops for fit in used])
    several = len(used) > 1
    return Laws(
        optima=tuple(map(of_budget, range(len(used)))),
        left_out=tuple(fit for fit in fits if not fit.is_inside),
        params_exponent=estimate(lambda points: _slope(log_flops, points[..., 0])) if several else None,
        tokens_exponent=estimate(lambda points: _slope(log_flops, points[..., 1])) if several else None,
        ratio=estimate(lambda points: np.exp((points[..., 1] - points[..., 0]).mean(-1))),
        scatter=scatter,
    )


def _slope(x: Floats, y: Floats) -> Floats:
    """Slopes (...) of the straight lines through points at x (n,) and y (..., n)."""
    centred = x - x.mean()
    slopes: Floats = y @ centred / (centred @ centred)
    return slopes


def _draws(fits: Sequence[Budget], scatter: float, degrees: int) -> Floats:
    """(draws, budgets, 2) lowest points as they might have come out."""
    rng = np.random.default_rng(SEED)
    sizes = scatter * np.sqrt(degrees / rng.chisquare(degrees, DRAWS))[:, None]  # nor is the scatter known
    noise = [sizes * rng.normal(size=(DRAWS, len(fit.x))) for fit in fits]
    return np.stack([fit.best(fit.drawn(each)) for fit, each in zip(fits, noise, strict=True)], axis=1)
