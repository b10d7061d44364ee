"""Weights & Biases as a sink that may fail or hang: a process of its own, so that it can do nothing to a run.

In ours it could end the interpreter, keep it for itself, change the working directory or the environment,
take over the console, or leave a hook that holds up the exit. It gets lines of JSON through a pipe instead.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROJECT = "nanochat"
WAITING = 10_000  # lines that may wait for a tracker that does not answer; then it is given up
FINISH_S = 30.0  # for what still waits when the run ends


class Tracker:
    """One run at the tracker. A failure is said once, and the run goes on without it (RELIABILITY P15)."""

    def __init__(
        self, mode: str, name: str, config: dict[str, Any], folder: Path, say: Callable[[str], None]
    ) -> None:
        """Begin; nothing is waited for.

        Args:
            mode: "online" or "offline".
            name: name of the run.
            config: what the tracker shows as configuration.
            folder: where it keeps its files.
            say: prints a line for the person at the console.
        """
        options = {
            "project": PROJECT,
            "name": name,
            "mode": mode,
            "config": config,
            "dir": str(folder.resolve()),
        }
        self._say = say
        self._lines: queue.Queue[str | None] = queue.Queue(WAITING)
        self._lines.put(json.dumps(options))
        self._trouble = ""
        self._given_up = False
        self._process: subprocess.Popen[str] | None = None
        self._thread = threading.Thread(target=self._work, name="tracker", daemon=True)
        self._thread.start()

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Hand over one line."""
        try:
            self._lines.put_nowait(json.dumps([step, values]))
        except queue.Full:
            self._trouble = self._trouble or f"it has not taken the last {WAITING:,} lines"
        self._give_up_if_troubled()

    def close(self) -> None:
        """Wait for what it has not taken yet, but not for ever."""
        if not self._given_up:
            try:
                self._lines.put_nowait(None)
                self._thread.join(FINISH_S)
            except queue.Full:
                pass
            if self._thread.is_alive():
                self._trouble = self._trouble or f"it has not ended after {FINISH_S:g} s"
        self._give_up_if_troubled()
        if self._process is not None:
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _give_up_if_troubled(self) -> None:
        if self._trouble and not self._given_up:
            self._given_up = True
            self._say(f"wandb failed ({self._trouble}); going on without it, metrics.jsonl has all.")

    def _work(self) -> None:
        """Pass the lines on, which may block; in a thread."""
        try:
            # Ctrl-C goes to a group of processes: the tracker is to end when it has been told all.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "nanochat.train.wandb_log"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
                cwd=Path(__file__).parents[2],  # where it finds this package
            )
            assert self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it says below why it has ended
                while (line := self._lines.get()) is not None:
                    self._process.stdin.write(line + "\n")
                    self._process.stdin.flush()
            told, _ = self._process.communicate()
            if told or self._process.returncode:
                self._trouble = told.strip() or f"exit code {self._process.returncode}"
        except Exception as error:
            self._trouble = str(error) or type(error).__name__


def main() -> None:
    """Be the process that talks to wandb: options, then [step, values], line by line from standard input.

    What went wrong is all that goes to standard output; wandb's own words go to standard error.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with os.fdopen(os.dup(1), "w") as answer:
        os.dup2(2, 1)
        code = 0
        try:
            _talk()
        except BaseException as error:
            answer.write(str(error) or type(error).__name__)
            answer.flush()
            code = 1
        os._exit(code)  # without the hooks that it has left


def _talk() -> None:
    options, lines = json.loads(sys.stdin.readline()), sys.stdin
    import wandb

    run: Any = wandb.init(**options)
    for line in lines:
        step, values = json.loads(line)
        run.log(values, step=step)
    run.finish()


if __name__ == "__main__":
    main()
