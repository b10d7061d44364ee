"""A fair comparison: variants x seeds, trained in turns, paired by seed, a verdict with its error.

    python -m dev.experiment dev/experiments/optimizers.toml --depth 3 --jobs 2
    python -m dev.experiment dev/experiments/optimizers.toml --depth 3 --report-only --difference 0.01

`dev/experiment_file.py` says what stands in the file. Every run is a run folder like any other, trained by
the command base_train. Stopped or killed and started again, the experiment keeps what is done and goes on
with the rest. It prints a table for dev/LOG.md, and draws all curves beside the file.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from dev import experiment_file, experiment_report, experiment_results, experiment_runs
from nanochat.common import files
from nanochat.common.errors import UserError, cli
from nanochat.common.stop_signals import STOPPED


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("file", type=Path, help="the experiment, a TOML file")
    parser.add_argument("--depth", type=int, help="in place of the file's")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument(
        "--threads", type=int, help="of each run; by default the processors, divided by --jobs"
    )
    parser.add_argument("--report-only", action="store_true", help="train nothing, report what is there")
    parser.add_argument(
        "--difference", type=float, help="say how many seeds a difference of so much bpb needs"
    )
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--plot", type=Path, help="where the curves go; by default beside the file")
    args = parser.parse_args()
    if args.jobs < 1 or (args.threads is not None and args.threads < 1):
        raise UserError(f"--jobs={args.jobs} --threads={args.threads}: expected numbers above 0.")
    return args


@cli
def main() -> None:
    """Train what is not done, and report."""
    args = _arguments()
    experiment = experiment_file.read(args.file, args.depth)
    complete = True
    if not args.report_only:
        places = experiment_runs.checkouts(experiment)
        plans = experiment_runs.dry_plans(experiment, places)
        threads = args.threads or max(1, (os.cpu_count() or 1) // args.jobs)
        complete = experiment_runs.train_all(experiment, plans, places, args.jobs, threads)
        if complete:
            experiment_runs.remove_checkouts(places)
    outcome = experiment_results.collect(experiment)
    if any(row.results for row in outcome.rows):
        path = args.plot or args.file.with_name(f"{experiment.name}.svg")
        experiment_report.draw(outcome, path)
        print(f"\n{experiment_report.markdown(outcome, args.difference)}\nCurves: {path}")
    if args.json:
        files.write_json(args.json, experiment_report.to_json(outcome))
    if not complete:
        sys.exit(STOPPED)
    if any(len(row.results) < row.asked for row in outcome.rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
