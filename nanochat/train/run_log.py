"""The log of a run: metrics.jsonl always, a line or a bar on the console, Weights & Biases on request.

Each may fail without the run: a disk that is full, a terminal that is gone, a tracker that hangs.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from nanochat.common import console
from nanochat.common.errors import warn
from nanochat.common.run_files import cut_back
from nanochat.train.wandb_log import Tracker

KEPT_BYTES = 1 << 24  # of lines that could not be written: some 20,000 steps


class MetricsFile:
    """metrics.jsonl as a sink that may fail: lines that could not be written are kept and tried again.

    A full disk must not end a run that could be saved elsewhere or later, and the curve is wanted whole.
    """

    def __init__(self, path: Path) -> None:
        """Open it to append."""
        self._path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._left = b""
        self._failing = False
        self._lost = 0

    def write(self, line: str) -> None:
        """Append a line; while that fails, keep it."""
        if len(self._left) < KEPT_BYTES:
            self._left += line.encode() + b"\n"
        else:
            self._lost += 1
        error = self._put()
        if error is not None and not self._failing:
            warn(f"{self._path}: {error.strerror}; the run goes on, its lines are kept and tried again")
        if error is None and self._failing:
            warn(f"{self._path}: can be written again")
        self._failing = error is not None

    def close(self) -> None:
        """Try once more what is left; say what is lost."""
        self._put()
        self._lost += self._left.count(b"\n")
        if self._lost:
            warn(f"{self._path}: the last {self._lost} lines could not be written and are lost")
        with contextlib.suppress(OSError):
            os.close(self._descriptor)

    def _put(self) -> OSError | None:
        """Write what is left, as far as it goes; why it did not go further."""
        try:
            while self._left:
                self._left = self._left[os.write(self._descriptor, self._left) :]
        except OSError as error:
            return error
        return None


class RunLog:
    """Metrics and console lines of a run. The main rank's alone does anything; others say `enabled=False`.

    Use it as a context manager: at the end the bar, the file and the tracker are closed.
    """

    def __init__(self, folder: Path, *, enabled: bool, total_steps: int, first_step: int = 0) -> None:
        """Open metrics.jsonl in `folder`, cut back to `first_step`."""
        self.console = Console(quiet=not enabled, highlight=False, soft_wrap=True)
        self._path = folder / "metrics.jsonl"
        self._file: MetricsFile | None = None
        self._tracker: Tracker | None = None
        self._unread = False
        if enabled:
            folder.mkdir(parents=True, exist_ok=True)
            if first_step and not self._path.exists():
                warn(f"{self._path} is not there: the curve of this run begins at step {first_step}")
            cut_back(self._path, first_step)
            self._file = MetricsFile(self._path)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        hidden = not (enabled and sys.stdout.isatty())
        self._bar = Progress(*columns, console=self.console, transient=True, disable=hidden)
        self._task = self._bar.add_task("starting", total=total_steps, completed=first_step)
        self._bar.start()

    def __enter__(self) -> RunLog:
        """Return the log."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the bar, the file and the tracker, which reads the file to its end."""
        if not self._bar.disable:
            self._bar.stop()
        if self._file is not None:
            self._file.close()
        if self._tracker is not None:
            self._tracker.close()

    def start_tracker(self, mode: str, name: str, config: dict[str, Any]) -> None:
        """Also log to Weights & Biases, unless `mode` is "off"; arguments as in `Tracker`."""
        if mode != "off" and self._file is not None:
            self._tracker = Tracker(mode, name, config, self._path, self.say)

    def say(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        self.console.print(text, markup=False)
        if not self._unread and self._file is not None and console.reader_is_gone():
            self._unread = True
            warn("nobody reads standard output any more; the run goes on, metrics.jsonl has all")

    def write(self, kind: str, step: int, **values: float | int | str | None) -> None:
        """Append one object to metrics.jsonl.

        Args:
            kind: "step", "eval", "core", "sample" or "skip".
            step: optimizer steps done before this was measured; for a step, its own index.
            values: the measurements; numbers stay numbers.
        """
        if self._file is not None:
            self._file.write(json.dumps({"kind": kind, "step": step, **values}))
        if self._tracker is not None:
            self._tracker.check()

    def step(self, step: int, line: str, **values: float | int | str | None) -> None:
        """Record one optimizer step, and show it: a line in a log, the bar on a terminal."""
        self.write("step", step, **values)
        if self._bar.disable:
            self.say(line)
        else:
            self._bar.update(self._task, completed=step + 1, description=line)
