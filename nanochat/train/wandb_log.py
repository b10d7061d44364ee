"""Weights & Biases as a reader of metrics.jsonl, in a process of its own that may fail or hang.

In the process of the run it could end the interpreter, keep it for itself, change the working directory or
the environment, take over the console, or leave a hook that holds up the exit. A second process follows the
file of metrics instead, and the run only looks whether it is still there.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROJECT = "nanochat"
POLL_S = 1.0  # between two looks at the end of the file
FINISH_S = 30.0  # for what is left to read when the run ends
MESSAGE_LETTERS = 1000  # of an error: a pipe that nobody reads yet takes so much


class Tracker:
    """The process that reads along. A failure is printed once, and the run goes on (RELIABILITY P15)."""

    def __init__(
        self, mode: str, name: str, config: dict[str, Any], metrics: Path, say: Callable[[str], None]
    ) -> None:
        """Start the process; nothing is waited for.

        Args:
            mode: "online" or "offline".
            name: name of the run.
            config: what wandb shows as the configuration.
            metrics: the file to read, from its present end on; wandb's own files go beside it.
            say: prints a line on the console.
        """
        metrics = metrics.resolve()
        options = {"project": PROJECT, "name": name, "mode": mode, "config": config}
        options["dir"] = str(metrics.parent)
        begin = {"metrics": str(metrics), "start": metrics.stat().st_size, "options": options}
        self._say = say
        self._process: subprocess.Popen[str] | None = None
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "nanochat.train.wandb_log", json.dumps(begin)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,  # Ctrl-C goes to a group of processes, and this one has to finish
                cwd=Path(__file__).parents[2],  # where it finds this package
            )
        except OSError as error:
            self._give_up(str(error))

    def check(self) -> None:
        """Print why the process has ended, if it has."""
        if self._process is not None and self._process.poll() is not None:
            self.close()

    def close(self) -> None:
        """Wait until the process has read all there is, but not for ever."""
        if self._process is None:
            return
        try:  # this closes its standard input, by which it knows that the run has ended
            error = self._process.communicate(timeout=FINISH_S)[0].strip()
            if error or self._process.returncode:
                self._give_up(error or f"exit code {self._process.returncode}")
        except subprocess.TimeoutExpired:
            self._give_up(f"it has not ended after {FINISH_S:g} s")
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            os.killpg(self._process.pid, signal.SIGKILL)  # and what it has started
            self._process.wait(POLL_S)
        self._process = None

    def _give_up(self, trouble: str) -> None:
        self._say(f"wandb failed ({trouble}); going on without it, metrics.jsonl has all.")


def main() -> None:
    """Be that process: its argument is JSON, the arguments of `_follow`.

    An error is all that goes to standard output; wandb's own messages go to standard error.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with os.fdopen(os.dup(1), "w", encoding="utf-8", errors="replace") as answer:
        os.dup2(2, 1)
        code = 0
        try:
            _follow(**json.loads(sys.argv[1]))
        except BaseException as error:
            answer.write((str(error) or type(error).__name__)[:MESSAGE_LETTERS])
            answer.flush()
            code = 1
        os._exit(code)  # without the hooks that it has left


def _follow(metrics: str, start: int, options: dict[str, Any]) -> None:
    """Log the lines of the file from `start` on, until the run has closed our standard input."""
    with Path(metrics).open("rb") as lines:
        lines.seek(start)
        import wandb

        run: Any = wandb.init(**options)
        line, ended = b"", False
        while True:
            line += lines.readline()
            if line.endswith(b"\n"):
                values = json.loads(line)
                kind, step, line = values.pop("kind"), values.pop("step"), b""
                run.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)
            elif ended:
                break
            else:
                ended = bool(select.select([0], [], [], POLL_S)[0])
        run.finish()


if __name__ == "__main__":
    main()
