"""An experiment's outcome for people and programs: a table for dev/LOG.md, the same as JSON, the curves."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dev import plots, stats
from dev.experiment_results import Outcome, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def spread(values: Sequence[float], form: str) -> str:
    """Mean and standard error as they are shown.

    >>> spread([1.0, 3.0], ".1f"), spread([2.0], ".1f"), spread([], ".1f")
    ('2.0 +- 1.0', '2.0', '-')
    """
    if not values:
        return "-"
    mean, stderr = stats.mean_and_stderr(values)
    return f"{mean:{form}}" if math.isnan(stderr) else f"{mean:{form}} +- {stderr:{form}}"


def _cells(row: Row, outcome: Outcome) -> list[str]:
    results = row.results.values()
    missed = f" ({len(row.steps)} of {len(row.results)})" if len(row.steps) < len(row.results) else ""
    difference = p = ""
    if row.comparison is not None:
        c = row.comparison
        difference = f"{c.difference:+.4f}" + ("" if math.isnan(c.stderr) else f" +- {c.stderr:.4f}")
        p = "" if math.isnan(row.p) else f"{row.p:.2g}"
    seeds = f"{len(row.results)}" + (f" of {row.asked}" if len(row.results) < row.asked else "")
    speeds = [result.tokens_per_second for result in results]
    memory = [result.peak_memory_bytes / 1e6 for result in results]
    return [
        row.name,
        seeds,
        spread([result.bpb for result in results], ".4f"),
        difference,
        p,
        row.verdict,
        spread(row.steps, ".0f") + missed,
        spread(row.seconds, ".0f") + missed,
        spread(speeds, ",.0f"),
        f"{statistics.mean(memory):,.0f}" if memory else "-",
    ]


def markdown(outcome: Outcome, difference: float | None = None) -> str:
    """The table and what goes with it, for dev/LOG.md.

    Args:
        outcome: of the experiment.
        difference: in bpb; how many seeds it would need is said too.
    """
    target = "the target" if outcome.target_bpb is None else f"{outcome.target_bpb:.4f}"
    head = ["variant", "seeds", "val bpb", f"minus {outcome.rows[0].name}", "p", "verdict"]
    head += [f"steps to {target}", f"seconds to {target}", "tokens/s", "peak MB"]
    lines = [head, ["---"] * len(head), *(_cells(row, outcome) for row in outcome.rows)]
    table = [f"| {' | '.join(line)} |" for line in lines]
    how = f"p of the paired t-test, adjusted after Holm for {_tests(outcome)}"
    notes = [f"Mean +- standard error over seeds; {how}."]
    notes += _power(outcome, difference)
    if outcome.commits:
        notes.append(f"Code: {', '.join(outcome.commits)}.")
    return "\n".join([f"Question: {outcome.experiment.question}", "", *table, "", *notes])


def _tests(outcome: Outcome) -> str:
    count = len(outcome.rows) - 1
    return "1 comparison" if count == 1 else f"{count} comparisons"


def _power(outcome: Outcome, difference: float | None) -> list[str]:
    """What the seeds at hand can find, and how many others need."""
    scatter = outcome.scatter
    if scatter is None or scatter.sd == 0:
        return []
    n = min(len(row.results) for row in outcome.rows if row.results)
    least = stats.detectable(scatter.sd, n, outcome.alpha)
    lines = [
        f"A paired difference scatters by {scatter.sd:.4f} ({scatter.degrees} degrees of freedom): {n} seeds "
        f"find one of {least:.4f} in {stats.POWER:.0%} of the cases."
    ]
    asked = [("", difference)] if difference else []
    open_rows = [row for row in outcome.rows if row.verdict == "not told apart" and row.comparison]
    asked += [(f" ({row.name})", row.comparison.difference) for row in open_rows if row.comparison]
    for what, size in asked:
        needed = stats.seeds_needed(size, scatter.sd, scatter.degrees, outcome.alpha) if size else None
        count = f"more than {stats.MOST_SEEDS}" if needed is None else str(needed)
        lines.append(f"A difference of {abs(size):.4f}{what} needs {count} seeds.")
    return lines


def to_json(outcome: Outcome) -> dict[str, Any]:
    """The same for programs; curves included."""

    def number(value: float) -> float | None:
        return None if math.isnan(value) else value

    rows = []
    for row, variant in zip(outcome.rows, outcome.experiment.variants, strict=True):
        c = row.comparison
        comparison = None
        if c is not None:
            comparison = {
                "n": c.n,
                "difference": c.difference,
                "stderr": number(c.stderr),
                "p": number(c.p),
                "p_adjusted": number(row.p),
                "verdict": row.verdict,
            }
        runs = [
            {
                "seed": seed,
                "val_bpb": result.bpb,
                "tokens_per_second": result.tokens_per_second,
                "peak_memory_bytes": result.peak_memory_bytes,
                "to_target": None if outcome.target_bpb is None else result.to_target(outcome.target_bpb),
                "curve": result.curve,
                "commit": result.commit,
            }
            for seed, result in sorted(row.results.items())
        ]
        named = {"name": row.name, "flags": variant.flags, "revision": variant.revision}
        rows.append({**named, "runs": runs, "comparison": comparison})
    return {
        "experiment": outcome.experiment.name,
        "question": outcome.experiment.question,
        "target_bpb": outcome.target_bpb,
        "scatter": None if outcome.scatter is None else outcome.scatter.sd,
        "scatter_degrees": None if outcome.scatter is None else outcome.scatter.degrees,
        "variants": rows,
    }


def draw(outcome: Outcome, path: Path) -> None:
    """All curves, over tokens and over seconds of training: what a step is worth, and what it costs."""
    runs = {row.name: list(row.results.values()) for row in outcome.rows if row.results}
    lowest = min(point.bpb for results in runs.values() for result in results for point in result.curve)
    worst = max(result.bpb for results in runs.values() for result in results)
    top = worst + 1.5 * (worst - lowest) + 0.1 * lowest  # the end is what is compared
    tokens = {
        name: [[(point.tokens / 1e6, point.bpb) for point in result.curve] for result in results]
        for name, results in runs.items()
    }
    seconds = {
        name: [[(point.seconds, point.bpb) for point in result.curve] for result in results]
        for name, results in runs.items()
    }

    def panels(left: Axes, right: Axes) -> None:
        plots.curves(left, tokens, "training tokens, millions", "validation bits per byte", top)
        plots.curves(right, seconds, "seconds of training", "validation bits per byte", top)

    plots.save(path, panels)
