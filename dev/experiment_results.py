"""What came of an experiment: figures of each run, read from its folder, and how sure the differences are."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dev import stats
from dev.experiment_file import Experiment
from dev.stats import Comparison, Scatter
from nanochat.common import files, run_files
from nanochat.evaluation.core import statistics as core_statistics

ENDED = ("finished", "target_reached")  # the latter with --target-loss


class Point(NamedTuple):
    """A validation: steps, training tokens and training seconds before it, and bits per byte."""

    step: int
    tokens: int
    seconds: float
    bpb: float


@dataclass(frozen=True)
class Result:
    """A run that has come to its end.

    Attributes:
        bpb: validation bits per byte at the end.
        curve: its validations, in order.
        tokens_per_second: median over steps.
        peak_memory_bytes: of the process that ended the run.
        commit: of the code, where the run knows it.
    """

    bpb: float
    curve: tuple[Point, ...]
    tokens_per_second: float
    peak_memory_bytes: int
    commit: str | None

    @staticmethod
    def read(folder: Path) -> Result | None:
        """From the files of a run; None where it has not ended."""
        if not (folder / "summary.json").is_file():
            return None
        summary = files.read_json(folder / "summary.json")
        if summary["status"] not in ENDED:
            return None
        config = files.read_json(folder / "config.json")
        metrics = run_files.read_lines(folder / "metrics.jsonl", run_files.MetricsLine, [])
        evals = [entry for entry in metrics if entry["kind"] == "eval"]
        speeds = [entry["tokens_per_second"] for entry in metrics if entry["kind"] == "step"]
        return Result(
            bpb=summary["val_bpb"],
            curve=tuple(_point(entry, config["batch_tokens"]) for entry in evals),
            tokens_per_second=statistics.median(speeds),
            peak_memory_bytes=summary["peak_memory_bytes"],
            commit=config.get("provenance", {}).get("commit"),
        )

    def to_target(self, bpb: float) -> tuple[float, float] | None:
        """Steps and training seconds until validation is first as low as `bpb`; None where it never is.

        Between two validations the curve is taken as straight, so that the answer is not theirs to round.
        """
        before = None
        for point in self.curve:
            if point.bpb <= bpb:
                if before is None:
                    return float(point.step), point.seconds
                share = (before.bpb - bpb) / (before.bpb - point.bpb)
                steps = before.step + share * (point.step - before.step)
                return steps, before.seconds + share * (point.seconds - before.seconds)
            before = point
        return None


def _point(entry: dict[str, Any], batch_tokens: int) -> Point:
    """From a line of metrics.jsonl; runs from before batch schedules do not say their tokens."""
    tokens = entry.get("tokens", entry["step"] * batch_tokens)
    return Point(entry["step"], tokens, entry["train_seconds"], entry["val_bpb"])


@dataclass(frozen=True)
class Row:
    """A variant in the table.

    Attributes:
        name: of the variant.
        results: of its runs that have ended, by seed.
        asked: runs that it should have.
        comparison: with the first variant; None for it, and where no seed is common.
        p: of the comparison, adjusted for the number of variants; NaN where there is none.
        steps: to the target, of the runs that reached it.
        seconds: likewise, of training alone.
    """

    name: str
    results: Mapping[int, Result]
    asked: int
    comparison: Comparison | None
    p: float
    steps: Sequence[float]
    seconds: Sequence[float]

    @property
    def verdict(self) -> str:
        """What may be said of the variant."""
        if self.comparison is None or math.isnan(self.p):
            return ""
        if self.p >= stats.ALPHA:
            return "not told apart"
        return "better" if self.comparison.difference < 0 else "worse"


@dataclass(frozen=True)
class Outcome:
    """An experiment as far as it has come.

    Attributes:
        experiment: what was asked.
        target_bpb: that steps and seconds are counted to: the file's, else the highest that the first variant
            ended at, which all its runs reach; None before any of them has ended.
        rows: one a variant, in the order of the file.
        scatter: of paired differences, where there are enough runs to tell.
    """

    experiment: Experiment
    target_bpb: float | None
    rows: tuple[Row, ...]
    scatter: Scatter | None

    @property
    def alpha(self) -> float:
        """Level at which each variant alone is tested, when Holm's first step is the one to pass."""
        return stats.ALPHA / max(1, len(self.rows) - 1)

    @property
    def commits(self) -> list[str]:
        """Those of the code that ran here; several where it changed while the experiment went on."""
        plain = {variant.name for variant in self.experiment.variants if variant.revision is None}
        results = (result for row in self.rows if row.name in plain for result in row.results.values())
        return sorted({result.commit for result in results if result.commit})


def collect(experiment: Experiment) -> Outcome:
    """Read the runs that have ended and compare them."""
    results: dict[str, dict[int, Result]] = {variant.name: {} for variant in experiment.variants}
    for run in experiment.order():
        if (result := Result.read(files.run_dir(run.name))) is not None:
            results[run.variant.name][run.seed] = result
    first = next(iter(results.values()))
    target = experiment.target_bpb
    if target is None and first:
        target = max(result.bpb for result in first.values())
    final = [{seed: result.bpb for seed, result in each.items()} for each in results.values()]
    compared = [None, *(stats.paired(final[0], each) for each in final[1:])]
    adjusted = core_statistics.holm([math.nan if each is None else each.p for each in compared])
    rows = []
    for (name, found), comparison, p in zip(results.items(), compared, adjusted, strict=True):
        reached = [result.to_target(target) for result in found.values() if target is not None]
        steps, seconds = ([point[i] for point in reached if point is not None] for i in (0, 1))
        rows.append(Row(name, found, len(experiment.seeds), comparison, p, steps, seconds))
    return Outcome(experiment, target, tuple(rows), stats.scatter([each for each in final if each]))
