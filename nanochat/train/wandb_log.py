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

POLL_S = 1.0  # between two looks at the end of the file
FINISH_S = 30.0  # for what is left to read when the run ends
MESSAGE_BYTES = 1000  # of an error: a pipe that nobody reads yet takes so much


class Tracker:
    """The process that reads along. A failure is printed once, and the run goes on (RELIABILITY P15)."""

    def __init__(self, mode: str, metrics: Path, say: Callable[[str], None]) -> None:
        """Start the process; nothing is waited for.

        Args:
            mode: "online" or "offline", or "off" for no process.
            metrics: the file to read, from its present end on; wandb's own files go beside it.
            say: prints a line on the console.
        """
        self._say = say
        self._process: subprocess.Popen[bytes] | None = None
        if mode == "off":
            return
        try:
            arguments = [mode, str(metrics.resolve()), str(metrics.stat().st_size)]
            self._process = subprocess.Popen(
                [sys.executable, "-m", "nanochat.train.wandb_log", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
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
            error = self._process.communicate(timeout=FINISH_S)[0].decode(errors="replace").strip()
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
    """Be that process: the mode, the file and where to begin in it are its arguments.

    An error is all that goes to standard output; wandb's own messages go to standard error.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answer, trouble = os.dup(1), ""
    os.dup2(2, 1)
    try:
        _follow(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
    except BaseException as error:
        trouble = str(error) or type(error).__name__
    os.write(answer, trouble.encode(errors="replace")[:MESSAGE_BYTES])
    os._exit(bool(trouble))  # without the hooks that wandb has left


def _follow(mode: str, metrics: Path, start: int) -> None:
    """Log the lines of the file from `start` on, until the run has closed our standard input."""
    folder = metrics.parent
    config = json.loads((folder / "config.json").read_text("utf-8"))
    with metrics.open("rb") as lines:
        lines.seek(start)
        import wandb

        run: Any = wandb.init(project="nanochat", name=folder.name, mode=mode, config=config, dir=str(folder))
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
