"""Whether runs show that the mean validation loss is at or below a bar: the rule of the race to 3.28.

    python -m dev.significance --declare 4 [--extend-to 8] RUN      # when the first run has begun
    python -m dev.significance RUN RUN ... [--target 3.28] [--level 0.01]

One run below the bar may be luck. The rule of the modded-nanogpt speedrun: the runs of a record, which
differ in their seed alone, must refute at p < 0.01 that their mean is above it. The test is Student's,
one-sided, with the scatter that the runs have themselves.

Who looks after each run and stops when p is small believes six false records in a hundred, and who names the
best four of twenty runs believes three of four. So the number of runs is declared before one has ended, their
seeds are 0, 1, 2 ..., every run of the configuration is named, and a declared extension has each of its two
looks at half the level. Runs that stopped because they had reached the bar are refused: they are below it by
the way they were chosen.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from dev import stats
from nanochat.common import files
from nanochat.common.errors import UserError, cli

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
        declared: whether the number of runs was fixed before one had ended; without, it is no claim.
    """

    losses: Sequence[float]
    target: float
    p: float
    level: float
    declared: bool = True

    @property
    def holds(self) -> bool:
        """Whether the mean is shown to be below the bar."""
        return self.p < self.level

    def describe(self) -> str:
        """In a few lines."""
        mean, stderr = stats.mean_and_stderr(self.losses)
        verdict = "shown" if self.holds and self.declared else "not shown"
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
            lines.append("these do not count for them, unless an extension was declared")
        if not self.declared:
            lines.append(
                "no claim: the number of runs was not declared before the first had ended (--declare)"
            )
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


def configuration(config: dict[str, Any]) -> dict[str, Any]:
    """What runs of one claim share: all arguments but those that are free, the corpus and the tokenizer."""
    args = {name: value for name, value in config["args"].items() if name not in FREE}
    return {"args": args, "fingerprints": config.get("fingerprints")}


def runs_of(wanted: dict[str, Any]) -> list[str]:
    """All runs of the base directory with a configuration, whether they have ended or not."""
    found = []
    for path in sorted((files.base_dir() / "runs").glob("*/config.json")):
        with contextlib.suppress(UserError, KeyError, TypeError, AttributeError):  # not of this version
            if configuration(files.read_json(path)) == wanted:
                found.append(path.parent.name)
    return found


def require_alike(runs: Sequence[str]) -> dict[str, Any]:
    """The configuration that runs share but for their seed.

    Raises:
        UserError: a run is named twice, two have one seed, they differ in more than the seed, a seed is left
            out, or a run of the same configuration.
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
    if omitted := sorted(set(runs_of(configuration(first))) - set(runs)):
        raise UserError(
            f"run {omitted[0]!r} has the same configuration and is not named. A claim leaves out no run: "
            "name it too, or move the folder of a run that never ended out of the runs."
        )
    if sorted(seeds) != list(range(len(seeds))):
        raise UserError(
            f"runs {', '.join(runs)}: their seeds are {sorted(seeds)}, expected 0 to {len(seeds) - 1}: seeds "
            "with gaps may have been chosen. Train the missing ones."
        )
    shared: dict[str, Any] = first
    return shared


class Declared(TypedDict):
    """How many runs a claim was to have, as it was said before one of them had ended."""

    runs: int
    extend_to: int | None


def _declaration_of(config: dict[str, Any]) -> Path:
    text = json.dumps(configuration(config), sort_keys=True)
    return files.base_dir() / "claims" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def declare(run: str, count: int, extend_to: int | None = None) -> Path:
    """Fix the number of runs of a claim, by its first run, before any run of the configuration has ended.

    Raises:
        UserError: one has ended, another number was declared, or the numbers are none.
    """
    if count < 2 or (extend_to is not None and extend_to <= count):
        raise UserError(
            f"--declare {count} --extend-to {extend_to}: expected 2 runs or more, then still more."
        )
    config = files.read_json(files.run_dir(run) / "config.json")
    path, said = _declaration_of(config), {"runs": count, "extend_to": extend_to}
    if path.exists():
        if (before := files.read_json(path)) != said:
            raise UserError(f"{path}: {before} was declared for this configuration. It stays.")
        return path
    if ended := [
        name for name in runs_of(configuration(config)) if (files.run_dir(name) / "summary.json").exists()
    ]:
        raise UserError(f"run {ended[0]!r} of this configuration has ended: its loss may have been seen.")
    files.write_json(path, said)
    return path


def claim(runs: Sequence[str], target: float = TARGET, level: float = LEVEL) -> Verdict:
    """What the named runs show, by what was declared of them.

    Raises:
        UserError: as `require_alike`, `final_loss` and `judge`, or it is another number than was declared.
    """
    path = _declaration_of(require_alike(runs))
    losses = [final_loss(run) for run in runs]
    if not path.exists():
        return dataclasses.replace(judge(losses, target, level), declared=False)
    said: Declared = files.read_json(path, Declared)
    looks = [number for number in (said["runs"], said["extend_to"]) if number is not None]
    if len(runs) not in looks:
        raise UserError(
            f"{len(runs)} runs are named, and {' or '.join(map(str, looks))} were declared ({path}). "
            "Train and name so many."
        )
    return judge(losses, target, level / len(looks))


@cli
def main() -> None:
    """Judge the runs that are named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="names of runs that differ in their seed")
    parser.add_argument("--target", type=float, default=TARGET, help="the bar, nats per token")
    parser.add_argument("--level", type=float, default=LEVEL, help="that p must be below")
    parser.add_argument("--declare", type=int, metavar="N", help="fix the number of runs, by the first one")
    parser.add_argument(
        "--extend-to", type=int, metavar="N", help="allow one extension, at half the level each"
    )
    args = parser.parse_args()
    if args.declare is None:
        print(claim(args.runs, args.target, args.level).describe())
    elif len(args.runs) == 1:
        print(f"declared: {declare(args.runs[0], args.declare, args.extend_to)}")
    else:
        raise UserError(f"--declare {args.declare}: name the first run alone.")


if __name__ == "__main__":
    main()
