"""Runs of an experiment: started in turns by the command a user types, gone on with after a kill."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from dev import experiment_file
from dev.experiment_file import Experiment, Run
from dev.experiment_results import ENDED
from nanochat.common import files
from nanochat.common.errors import UserError
from nanochat.common.stop_signals import STOPPED, stop_signals

ROOT = Path(__file__).resolve().parents[1]
POLL_S = 0.2
TAIL_LINES = 3  # of the console of a run that failed
FREE_ARGS = ("run", "seed", "resume", "dry_run", "device_batch_size")  # may differ from those of an ended run
SAME_TOKENS = 0.01  # horizons that differ by less, as a share, are one: steps are whole


def _git(*arguments: str) -> str:
    """What git says in this checkout.

    Raises:
        UserError: git refuses.
    """
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


def checkouts(experiment: Experiment) -> dict[str, Path]:
    """The folder whose code each variant runs by: this one, or a worktree of its revision.

    The compiled tokenizer is that of this environment for all of them.
    """
    folder = experiment_file.folder_of(experiment.name)
    found = {}
    for variant in experiment.variants:
        found[variant.name] = ROOT
        if variant.revision is not None:
            commit = _git("rev-parse", "--verify", f"{variant.revision}^{{commit}}")
            place = folder / f"code-{commit[:12]}"
            if not (place / "scripts").is_dir():
                shutil.rmtree(place, ignore_errors=True)
                _git("worktree", "prune")
                _git("worktree", "add", "--detach", str(place), commit)
            found[variant.name] = place
    return found


def remove_checkouts(places: dict[str, Path]) -> None:
    """Take the worktrees away again."""
    for place in {place for place in places.values() if place != ROOT}:
        _git("worktree", "remove", "--force", str(place))


def command_of(run: Run, ranks: int) -> list[str]:
    """base_train as a user starts it."""
    if ranks == 1:
        return [sys.executable, "-m", "scripts.base_train", *run.arguments()]
    launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [sys.executable, "-m", *launcher, "-m", "scripts.base_train", "--", *run.arguments()]


def dry_plans(experiment: Experiment, places: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """What each variant would do, asked of its own code, before hours are spent on the first of them.

    Raises:
        UserError: base_train refuses a variant, or their horizons differ.
    """
    plans = {}
    for variant in experiment.variants:
        run = experiment.run(variant, experiment.seeds[0])
        command = [sys.executable, "-m", "scripts.base_train", *run.arguments(), "--dry-run"]
        done = subprocess.run(command, cwd=places[variant.name], capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
            raise UserError(
                f"variant {variant.name!r}: base_train refuses it: {last.removeprefix('error: ')}"
            )
        plans[variant.name] = json.loads(done.stdout)
    first, *others = experiment.variants
    horizon = plans[first.name]["tokens"]
    for variant in others:
        tokens = plans[variant.name]["tokens"]
        if abs(tokens - horizon) > SAME_TOKENS * horizon:
            raise UserError(
                f"variant {variant.name!r}: trains on {tokens:,} tokens and {first.name!r} on {horizon:,}. "
                "Give all the same horizon: num-iterations and total-batch-size."
            )
    return plans


def is_done(run: Run, plan: dict[str, Any]) -> bool:
    """Whether a run has come to its end with the arguments that it is asked to have now.

    Raises:
        UserError: it was begun with others.
    """
    folder = files.run_dir(run.name)
    if not (folder / "config.json").is_file():
        return False
    then, now = files.read_json(folder / "config.json")["args"], plan["args"]
    shared = (then.keys() & now.keys()) - set(FREE_ARGS)  # a flag that came later had no effect then
    if changed := [
        f"{name} {then[name]!r} then, {now[name]!r} now" for name in shared if then[name] != now[name]
    ]:
        raise UserError(
            f"{folder}: was begun with other flags: {'; '.join(sorted(changed))}. Name the variant or the "
            "file anew, or delete the folder."
        )
    summary = folder / "summary.json"
    return summary.is_file() and files.read_json(summary)["status"] in ENDED


@dataclass
class Training:
    """A run under way; its lock is held as long as a process of it lives, whoever started that."""

    run: Run
    process: subprocess.Popen[bytes]
    console: Path
    lock: TextIO
    began: float


def _start(run: Run, experiment: Experiment, place: Path, threads: int) -> Training | None:
    """Start a run; None where another process is at it."""
    folder = experiment_file.folder_of(experiment.name)
    lock = (folder / f"{run.name}.lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    console = folder / f"{run.name}.log"
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),  # see runs/_common.sh
        "NANOCHAT_BASE_DIR": str(files.base_dir().absolute()),
        "PYTHONPATH": str(place),
    }
    with console.open("ab") as sink:
        process = subprocess.Popen(
            command_of(run, experiment.ranks),
            cwd=place,
            env=environment,
            stdout=sink,
            stderr=subprocess.STDOUT,
            pass_fds=(lock.fileno(),),
            start_new_session=True,  # Ctrl-C is for us, who ask each run once to save and leave
        )
    return Training(run, process, console, lock, time.monotonic())


class Queue:
    """The runs that are still to do, and those under way."""

    def __init__(
        self, experiment: Experiment, plans: dict[str, dict[str, Any]], places: dict[str, Path], threads: int
    ) -> None:
        """Plans and places are by name of the variant; `threads` is for each run."""
        self._experiment, self._plans, self._places, self._threads = experiment, plans, places, threads
        self.waiting = [run for run in experiment.order() if not self._is_done(run)]
        self.under_way: list[Training] = []
        self._elsewhere: set[str] = set()

    def _is_done(self, run: Run) -> bool:
        return is_done(run, self._plans[run.variant.name])

    def start(self, places: int) -> None:
        """Start as many runs as there are places for; what another process is at goes to the end."""
        for run in self.waiting[:places]:
            self.waiting.remove(run)
            if self._is_done(run):  # by now, by another process
                continue
            if started := _start(run, self._experiment, self._places[run.variant.name], self._threads):
                self.under_way.append(started)
                continue
            self.waiting.append(run)
            if run.name not in self._elsewhere:
                print(f"{run.name}: another process is at it; waiting for its end", flush=True)
                self._elsewhere.add(run.name)

    def collect(self) -> None:
        """Say how runs ended that did."""
        for training in [each for each in self.under_way if each.process.poll() is not None]:
            self.under_way.remove(training)
            _end(training, self._experiment.keep_checkpoints)

    def stop(self) -> None:
        """Ask the runs to save and leave, and wait for them."""
        for training in self.under_way:
            training.process.terminate()
        for training in self.under_way:
            training.process.wait()


def train_all(
    experiment: Experiment, plans: dict[str, dict[str, Any]], places: dict[str, Path], jobs: int, threads: int
) -> bool:
    """Train what is not done yet, `jobs` runs at a time; a run that fails is told and passed over.

    Returns:
        False where a signal asked to stop.
    """
    experiment_file.folder_of(experiment.name).mkdir(parents=True, exist_ok=True)
    queue = Queue(experiment, plans, places, threads)
    total = len(experiment.seeds) * len(experiment.variants)
    print(f"{experiment.name}: {total} runs, {total - len(queue.waiting)} of them done", flush=True)
    with stop_signals() as stop_requested:
        while (queue.waiting or queue.under_way) and not stop_requested():
            queue.start(jobs - len(queue.under_way))
            time.sleep(POLL_S)
            queue.collect()
        queue.stop()
        queue.collect()
        return not stop_requested()


def _end(training: Training, keep_checkpoints: bool) -> None:
    """Say how a run ended."""
    training.lock.close()
    seconds = time.monotonic() - training.began
    run, code = training.run, training.process.returncode
    if code == 0:
        summary = files.read_json(files.run_dir(run.name) / "summary.json")
        print(f"{run.name}: validation bpb {summary['val_bpb']:.4f}, {seconds:.0f} s", flush=True)
        if not keep_checkpoints:
            shutil.rmtree(files.checkpoints_dir(run.name), ignore_errors=True)
    elif code in (STOPPED, -signal.SIGTERM):  # the latter where it had not begun yet
        print(f"{run.name}: stopped after {seconds:.0f} s", flush=True)
    else:
        last = training.console.read_text("utf-8", errors="replace").strip().splitlines()[-TAIL_LINES:]
        print(f"{run.name}: failed with exit code {code}, see {training.console}", flush=True)
        for line in last:
            print(f"  {line}", flush=True)
