"""Scaling laws from iso-FLOP sweeps: the best size for each budget, and how it grows with the budget.

    python -m dev.scaling_analysis RUN RUN ... [--plot FILE.svg] [--json FILE]

Runs of one --target-flops and several depths are a budget; `runs/scaling_laws.sh` makes them. Several seeds
of a depth are several runs of it. `dev/scaling_fit.py` says how the fits and their intervals are made.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dev import plots
from dev.scaling_fit import Budget, Estimate, Laws, Trained, analyse
from nanochat.common import charts, files
from nanochat.common.errors import UserError, cli

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def read(run: str) -> Trained:
    """A run of a sweep, from its files.

    Raises:
        UserError: it has not ended, or was not given its FLOPs.
    """
    folder = files.run_dir(run)
    config, summary = files.read_json(folder / "config.json"), files.read_json(folder / "summary.json")
    if summary["status"] != "finished":
        raise UserError(f"run {run!r}: it has not ended ({summary['status']}). Go on with it: --resume auto.")
    budget = config["args"]["target_flops"]
    if budget is None:
        raise UserError(f"run {run!r}: it was not given its FLOPs. Train it with --target-flops.")
    params = config["params"]["matrix"] + config["params"]["unembedding"]
    return Trained(budget, params, summary["tokens"], summary["val_bpb"])


def shown(estimate: Estimate | None, form: str) -> str:
    """A figure and its interval, as in the table."""
    if estimate is None:
        return "-"
    if estimate.interval is None:
        return f"{estimate.value:{form}} (not told)"
    return f"{estimate.value:{form}} ({estimate.interval[0]:{form}} to {estimate.interval[1]:{form}})"


def markdown(laws: Laws) -> str:
    """The table and the laws, for dev/LOG.md."""
    head = ["FLOPs", "runs", "best N", "tokens", "tokens : N", "bpb there"]
    rows = [
        [
            f"{optimum.budget.flops:.3g}",
            str(len(optimum.budget.x)),
            shown(optimum.params, ".3g"),
            shown(optimum.tokens, ".3g"),
            shown(optimum.ratio, ".1f"),
            f"{optimum.bpb:.4f}",
        ]
        for optimum in laws.optima
    ]
    for budget in laws.left_out:
        rows.append([f"{budget.flops:.3g}", str(len(budget.x)), "not among the sizes tried", "", "", ""])
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    scatter = "none: three sizes a budget" if laws.scatter is None else f"{laws.scatter:.4f} bpb"
    return "\n".join(
        [
            *lines,
            "",
            f"N ~ C^a with a = {shown(laws.params_exponent, '.2f')}; D ~ C^b with b = "
            f"{shown(laws.tokens_exponent, '.2f')}.",
            f"Tokens a parameter, over these budgets: {shown(laws.ratio, '.1f')}.",
            f"Intervals hold 95 %; scatter about the parabolas: {scatter}.",
        ]
    )


def to_json(laws: Laws) -> dict[str, Any]:
    """The same for programs."""

    def figure(estimate: Estimate | None) -> dict[str, Any] | None:
        return None if estimate is None else {"value": estimate.value, "interval": estimate.interval}

    return {
        "budgets": [
            {
                "flops": optimum.budget.flops,
                "params": figure(optimum.params),
                "tokens": figure(optimum.tokens),
                "ratio": figure(optimum.ratio),
                "val_bpb": optimum.bpb,
            }
            for optimum in laws.optima
        ],
        "left_out": [budget.flops for budget in laws.left_out],
        "params_exponent": figure(laws.params_exponent),
        "tokens_exponent": figure(laws.tokens_exponent),
        "ratio": figure(laws.ratio),
        "scatter": laws.scatter,
    }


def draw(laws: Laws, path: Path) -> None:
    """The parabolas with their runs, and the best sizes over the budget."""

    def panels(left: Axes, right: Axes) -> None:
        _draw_budgets(left, laws)
        _draw_growth(right, laws)

    plots.save(path, panels)


def _draw_budgets(axes: Axes, laws: Laws) -> None:
    budgets: list[Budget] = sorted(
        [*(optimum.budget for optimum in laws.optima), *laws.left_out], key=lambda budget: budget.flops
    )
    for number, budget in enumerate(budgets):
        color = plots.COLORS[number % len(plots.COLORS)]
        x = np.linspace(budget.x.min(), budget.x.max(), 60)
        axes.plot(np.exp(x), budget.at(x), color=color, linewidth=1, label=f"{budget.flops:.2g} FLOPs")
        axes.plot(np.exp(budget.x), budget.y, "o", color=color, markersize=3)
    for optimum in laws.optima:
        axes.plot(optimum.params.value, optimum.bpb, "v", color=charts.INK, markersize=5)
    axes.set(xscale="log", xlabel="scaling parameters N", ylabel="validation bits per byte")
    axes.legend(fontsize=7)


def _draw_growth(axes: Axes, laws: Laws) -> None:
    flops = [optimum.budget.flops for optimum in laws.optima]
    for name, marker, color, estimates in (
        ("parameters N", "o", plots.COLORS[0], [optimum.params for optimum in laws.optima]),
        ("tokens D", "s", plots.COLORS[4], [optimum.tokens for optimum in laws.optima]),
    ):
        values = [estimate.value for estimate in estimates]
        axes.plot(flops, values, marker, color=color, markersize=5, label=name)
        for at, estimate in zip(flops, estimates, strict=True):
            if estimate.interval is not None:
                axes.plot([at, at], estimate.interval, color=color, linewidth=1)
        if len(flops) > 1:
            slope, start = np.polyfit(np.log(flops), np.log(values), 1)
            fitted = np.exp(start + slope * np.log(flops))
            axes.plot(flops, fitted, color=color, linewidth=0.8, linestyle="--")
    axes.set(xscale="log", yscale="log", xlabel="budget C, FLOPs")
    axes.legend(fontsize=7)


def sweep(runs: Sequence[str]) -> Laws:
    """Read and fit."""
    return analyse([read(run) for run in runs])


@cli
def main() -> None:
    """Analyse the runs that are named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="names of the runs of a sweep")
    parser.add_argument("--plot", type=Path, help="draw the fits there, as SVG")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    laws = sweep(args.runs)
    print(markdown(laws))
    if args.plot:
        draw(laws, args.plot)
    if args.json:
        files.write_json(args.json, to_json(laws))


if __name__ == "__main__":
    main()
