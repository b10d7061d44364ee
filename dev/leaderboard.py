"""A row of dev/LEADERBOARD.md, made from the files of the runs that it stands for.

    python -m dev.leaderboard --race core RUN RUN ...
    python -m dev.leaderboard --race loss RUN RUN ...

The runs are one configuration with several seeds. `core` is the race to GPT-2's CORE and reads
base_eval.json; `loss` is the race to a validation loss of 3.28 and reads summary.json.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
from collections.abc import Sequence
from typing import Any

from dev import significance
from dev.experiment_report import spread
from nanochat.common import files
from nanochat.common.errors import UserError, cli
from nanochat.evaluation.core.results import is_core

COMMON = ("date", "commit", "command", "hardware", "seeds")
HEADS = {
    "core": (*COMMON, "CORE (mean +- se)", "val bpb", "tokens", "FLOPs", "minutes"),
    "loss": (*COMMON, "val loss (mean +- se)", "p (mean <= 3.28)", "steps", "tokens", "minutes"),
}
OF_A_SEED = ("--run", "--seed", "--resume")  # flags that say nothing of the configuration


def shown_command(command: str) -> str:
    """A command without the launcher and without what differs between its seeds.

    >>> shown_command("-u -m scripts.base_train --depth=24 --run x --seed=3 --fp8")
    'base_train --depth=24 --fp8'
    """
    words = shlex.split(command)
    start = next((i for i, word in enumerate(words) if "base_train" in word), -1)
    kept, is_value = ["base_train"], False
    for word in words[start + 1 :]:
        name, has_value, _ = word.partition("=")
        if name in OF_A_SEED:
            is_value = not has_value
        elif is_value:
            is_value = False
        elif word != "--":
            kept.append(word)
    return shlex.join(kept)


def row(race: str, runs: Sequence[str]) -> list[str]:
    """The cells of a row.

    Raises:
        UserError: the runs are not one configuration with several seeds, or lack what the race is about.
    """
    config = significance.require_alike(runs)
    summaries = [_summary(run) for run in runs]
    provenance, machine = config.get("provenance"), config.get("machine", {})
    if not provenance:
        raise UserError(f"run {runs[0]!r}: config.json does not say its commit; it is of an older version.")
    tokens = statistics.mean(summary["tokens"] for summary in summaries)
    minutes = spread([summary["train_seconds"] / 60 for summary in summaries], ".2f")
    common = [
        provenance["date"],
        provenance["commit"] or "unknown",
        f"`{shown_command(provenance['command'])}`",
        f"{summaries[0]['world_size']} x {machine.get('device', 'unknown')}",
        str(len(runs)),
    ]
    if race == "core":
        scores = [_core(run) for run in runs]
        bpb = spread([summary["val_bpb"] for summary in summaries], ".5f")
        flops = f"{tokens * config['flops_per_token']:.3g}"
        return [*common, spread(scores, ".4f"), bpb, f"{tokens:.4g}", flops, minutes]
    losses = [significance.final_loss(run) for run in runs]
    p = "one run"
    if len(runs) > 1:
        claim = significance.claim(runs)
        p = f"{claim.p:.2g}" + ("" if claim.declared else ", runs not declared")
    steps = f"{summaries[0]['steps']:,}"
    return [*common, spread(losses, ".5f"), p, steps, f"{tokens:.4g}", minutes]


def _summary(run: str) -> dict[str, Any]:
    summary: dict[str, Any] = files.read_json(files.run_dir(run) / "summary.json")
    if summary["status"] not in ("finished", "target_reached"):
        raise UserError(f"run {run!r}: it has not ended ({summary['status']}). Go on with it: --resume auto.")
    return summary


def _core(run: str) -> float:
    scores = files.read_json(files.run_dir(run) / "base_eval.json")
    if scores.get("core_metric") is None or not is_core(scores["tasks"]):
        raise UserError(
            f"run {run!r}: base_eval.json has no CORE of the whole bundle. Score it: --eval core."
        )
    return float(scores["core_metric"])


@cli
def main() -> None:
    """Print the head of the race and the row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="names of runs that differ in their seed")
    parser.add_argument("--race", choices=tuple(HEADS), required=True)
    args = parser.parse_args()
    head = HEADS[args.race]
    for cells in (head, ("---",) * len(head), row(args.race, args.runs)):
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
