"""The log of a run: metrics.jsonl and lines on the console always, Weights & Biases on request.

Each may fail without the run: a disk that is full, a terminal that is gone, a tracker that hangs.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from nanochat.common import console
from nanochat.common.errors import warn
from nanochat.common.run_files import cut_back
from nanochat.train.wandb_log import Tracker

KEPT_BYTES = 1 << 24  # of lines that could not be written: some 20,000 steps


class RunLog:
    """Metrics and console lines of a run. The main rank's alone does anything; others say `enabled=False`.

    To be closed at the end.
    """

    def __init__(self, folder: Path, enabled: bool, first_step: int = 0, wandb: str = "off") -> None:
        """Open metrics.jsonl in `folder`, cut back to `first_step`, and start the tracker.

        Args:
            folder: of the run; config.json is there already.
            enabled: on the main rank.
            first_step: the one that comes next.
            wandb: "off", or the mode of Weights & Biases: "online" or "offline".
        """
        self._enabled = enabled
        self._unread = self._failing = False
        self._path = folder / "metrics.jsonl" if enabled else Path(os.devnull)
        if enabled:
            folder.mkdir(parents=True, exist_ok=True)
            if first_step and not self._path.exists():
                warn(f"{self._path} is not there: the curve of this run begins at step {first_step}")
            cut_back(self._path, first_step)
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._left = b""  # lines that could not be written yet
        self._lost = 0
        self._tracker = Tracker(wandb if enabled else "off", self._path, self.say)

    def close(self) -> None:
        """Close the file, and then the tracker, which reads it to its end; warn of lines that are lost."""
        self._flush()
        self._lost += self._left.count(b"\n")
        if self._lost:
            warn(f"{self._path}: the last {self._lost} lines could not be written and are lost")
        with contextlib.suppress(OSError):
            os.close(self._file)
        self._tracker.close()

    def say(self, text: str) -> None:
        """Print a line."""
        if self._enabled:
            print(text, flush=True)
            if not self._unread and console.reader_is_gone():
                self._unread = True
                warn("nobody reads standard output any more; the run goes on, metrics.jsonl has all")

    def record(
        self, kind: str, step: int, line: str, **values: float | int | str | dict[str, float] | None
    ) -> None:
        """Print a line, and append one object to metrics.jsonl: while that fails, keep it for the next time.

        A full disk must not end a run that could be saved elsewhere or later, and the curve is wanted whole.

        Args:
            kind: "step", "eval", "core", "sample", "skip", "chat_val" or "chat_eval".
            step: optimizer steps done before this was measured; for a step, its own index.
            line: says the same on the console.
            values: the measurements; numbers stay numbers.
        """
        if len(self._left) < KEPT_BYTES:
            self._left += json.dumps({"kind": kind, "step": step, **values}).encode() + b"\n"
        else:
            self._lost += 1
        error = self._flush()
        if error is not None and not self._failing:
            warn(f"{self._path}: {error.strerror}; the run goes on, its lines are kept and tried again")
        if error is None and self._failing:
            warn(f"{self._path}: can be written again")
        self._failing = error is not None
        self._tracker.check()
        self.say(line)

    def _flush(self) -> OSError | None:
        """Write the lines that are left, as far as it goes. Returns the error that ended it."""
        try:
            while self._left:
                self._left = self._left[os.write(self._file, self._left) :]
        except OSError as error:
            return error
        return None
