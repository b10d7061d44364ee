"""Whether runs show that the mean validation loss is at or below a bar: the rule of the race to 3.28.

    python -m dev.significance RUN RUN ... [--target 3.28] [--level 0.01]

One run below the bar may be luck. The rule of the modded-nanogpt speedrun: the runs of a record, which
differ in their seed alone, must refute at p < 0.01 that their mean is above it. The test is Student's,
one-sided, with the scatter that the runs have themselves. Runs that stopped because they had reached the bar
are refused: they are below it by the way they were chosen.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dev import stats
from nanochat import files
from nanochat.errors import UserError, cli

TARGET = 3.28  # nats a token, on the first 10,485,760 tokens of FineWeb's validation shard
LEVEL = 0.01
FREE = ("run", "seed", "resume", "device_batch_size", "wandb", "profile", "dist_timeout")


@dataclass(frozen=True)
class Verdict:
    """What the runs show.

    Attributes:
        losses: final validation loss of each run, nats a token.
        target: the bar.
        p: chance of losses so low if their mean were at the bar.
        level: that p must be below.
    """

    losses: Sequence[float]
    target: float
    p: float
    level: float

    @property
    def holds(self) -> bool:
        """Whether the mean is shown to be below the bar."""
        return self.p < self.level

    def describe(self) -> str:
        """In a few lines."""
        mean, stderr = stats.mean_and_stderr(self.losses)
        verdict = "shown" if self.holds else "not shown"
        test = f"one-sided t-test, p = {self.p:.2g}, {self.level} needed"
        lines = [
            f"{len(self.losses)} runs, validation loss {mean:.5f} +- {stderr:.5f} nats per token",
            f"mean at or below {self.target}: it is {verdict} ({test})",
        ]
        if not self.holds and mean < self.target and stderr > 0:
            needed, sd = 2, stderr * math.sqrt(len(self.losses))
            while stats.p_of_mean(mean - self.target, sd / math.sqrt(needed), needed) >= self.level:
                needed += 1
            lines.append(f"with this mean and scatter it would be with {needed} runs")
        return "\n".join(lines)


def judge(losses: Sequence[float], target: float = TARGET, level: float = LEVEL) -> Verdict:
    """Test the final losses of runs that differ in their seed alone.

    Raises:
        UserError: fewer than two runs, or a loss that is not a number.
    """
    if len(losses) < 2 or not all(math.isfinite(loss) for loss in losses):
        raise UserError(f"losses {list(losses)}: expected two or more numbers. Train other seeds too.")
    return Verdict(losses, target, stats.p_not_below(losses, target), level)


def final_loss(run: str) -> float:
    """The validation loss at the end of a run, nats a token.

    Raises:
        UserError: the run has not ended, was ended by its loss, or knows no loss in nats.
    """
    summary = files.read_json(files.run_dir(run) / "summary.json")
    if summary["status"] == "target_reached":
        raise UserError(
            f"run {run!r}: it stopped because its loss had reached --target-loss, which makes it no fair "
            "draw. Train runs of a fixed number of steps: --num-iterations."
        )
    if summary["status"] != "finished":
        raise UserError(f"run {run!r}: it has not ended ({summary['status']}). Go on with it: --resume auto.")
    if summary.get("val_loss") is None:
        raise UserError(
            f"run {run!r}: summary.json has no val_loss; it is of an older version. Train it again."
        )
    return float(summary["val_loss"])


def require_alike(runs: Sequence[str]) -> dict[str, Any]:
    """The configuration that runs share but for their seed.

    Raises:
        UserError: a run is named twice, two have one seed, or they differ in more than the seed.
    """
    configs = [files.read_json(files.run_dir(run) / "config.json") for run in runs]
    first = configs[0]
    for run, config in zip(runs[1:], configs[1:], strict=True):
        for name in sorted(first["args"].keys() | config["args"].keys()):
            then, now = first["args"].get(name), config["args"].get(name)
            if name not in FREE and then != now:
                raise UserError(
                    f"run {run!r}: {name} is {json.dumps(now)}, and {json.dumps(then)} in {runs[0]!r}. Runs "
                    "of one claim may differ in their seed alone."
                )
        if config.get("fingerprints") != first.get("fingerprints"):
            raise UserError(f"run {run!r}: its corpus or tokenizer is not that of {runs[0]!r}.")
    seeds = [config["args"]["seed"] for config in configs]
    if len(set(seeds)) < len(seeds):
        raise UserError(f"runs {', '.join(runs)}: their seeds are {seeds}; the same seed twice is one draw.")
    shared: dict[str, Any] = first
    return shared


@cli
def main() -> None:
    """Judge the runs that are named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="names of runs that differ in their seed")
    parser.add_argument("--target", type=float, default=TARGET, help="the bar, nats per token")
    parser.add_argument("--level", type=float, default=LEVEL, help="that p must be below")
    args = parser.parse_args()
    require_alike(args.runs)
    print(judge([final_loss(run) for run in args.runs], args.target, args.level).describe())


if __name__ == "__main__":
    main()
