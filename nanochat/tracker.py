"""Weights & Biases as a sink that may fail or hang: in a thread of its own, so that training never waits."""

from __future__ import annotations

import queue
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
        self._options = {"project": PROJECT, "name": name, "mode": mode, "config": config, "dir": str(folder)}
        self._say = say
        self._lines: queue.Queue[tuple[int, dict[str, Any]] | None] = queue.Queue(WAITING)
        self._trouble = ""
        self._given_up = False
        self._thread = threading.Thread(target=self._work, name="tracker", daemon=True)
        self._thread.start()

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Hand over one line."""
        try:
            self._lines.put_nowait((step, values))
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

    def _give_up_if_troubled(self) -> None:
        if self._trouble and not self._given_up:
            self._given_up = True
            self._say(f"wandb failed ({self._trouble}); going on without it, metrics.jsonl has all.")

    def _work(self) -> None:
        try:
            import wandb

            run: Any = wandb.init(**self._options)
            while (line := self._lines.get()) is not None:
                step, values = line
                run.log(values, step=step)
            run.finish()
        except Exception as error:
            self._trouble = str(error) or type(error).__name__
