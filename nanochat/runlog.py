"""What a run tells: metrics.jsonl always, a line or a bar on the console, a tracker if asked."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from nanochat import files
from nanochat.errors import UserError
from nanochat.tracker import Tracker


def cut_back(path: Path, step: int) -> None:
    """Drop the lines of metrics.jsonl from `step` on, and a last line that a kill left unfinished."""
    if not path.exists():
        return
    kept = [line + "\n" for line, entry in _entries(path) if entry["step"] < step]
    files.atomic_write(path, "".join(kept))


def _entries(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of metrics.jsonl and what they say; what a kill or a bad disk has left is passed over."""
    for line in path.read_text("utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            entry = json.loads(line)
            if isinstance(entry, dict) and type(entry.get("step")) is int:
                yield line, entry


def keep_aside(path: Path, step: int) -> Path | None:
    """Copy metrics.jsonl to metrics.<n>.jsonl beside it, if it tells of steps from `step` on.

    For a run that will not go over these steps as it did: they stay as the only trace of work that was done.
    """
    if not path.exists() or not any(e.get("kind") == "step" and e["step"] >= step for _, e in _entries(path)):
        return None
    number = 1
    while (copy := path.with_name(f"metrics.{number}.jsonl")).exists():
        number += 1
    files.atomic_write(copy, path.read_bytes())
    return copy


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, in order.

    Raises:
        UserError: the file is absent, or a line is not JSON.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file. Has this run been started?")
    entries = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error}). Remove the line.") from None
    return entries


class RunLog:
    """The voice of a run. Only the main rank has one that speaks; the others are given `enabled=False`.

    Use as a context manager: the bar is closed and the tracker is told at the end.
    """

    def __init__(self, folder: Path, *, enabled: bool, total_steps: int, first_step: int = 0) -> None:
        """Open metrics.jsonl in `folder`, cut back to `first_step`."""
        self.console = Console(quiet=not enabled, highlight=False, soft_wrap=True)
        self._enabled = enabled
        self._total_steps = total_steps
        self._tracker: Tracker | None = None
        self._file: TextIO | None = None
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if not enabled:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        cut_back(path, first_step)
        self._file = path.open("a", encoding="utf-8")
        if sys.stdout.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._task = self._bar.add_task("starting", total=total_steps, completed=first_step)
            self._bar.start()

    def __enter__(self) -> RunLog:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the bar, the file and the tracker."""
        if self._bar is not None:
            self._bar.stop()
        if self._file is not None:
            self._file.close()
        if self._tracker is not None:
            self._tracker.close()

    def start_tracker(self, mode: str, name: str, config: dict[str, Any], folder: Path) -> None:
        """Also log to Weights & Biases; a failure is said once and the run goes on without it.

        Args:
            mode: "off", "online" or "offline".
            name: name of the run.
            config: what the tracker shows as configuration.
            folder: where it keeps its files.
        """
        if mode != "off" and self._enabled:
            self._tracker = Tracker(mode, name, config, folder, self.say)

    def say(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        self.console.print(text, markup=False)

    def write(self, kind: str, step: int, **values: float | int | str | None) -> None:
        """Append one object to metrics.jsonl and hand it to the tracker.

        Args:
            kind: "step", "eval", "core", "sample".
            step: optimizer steps done before this was measured; for a step, its own index.
            values: what was measured; numbers stay numbers.
        """
        if self._file is None:
            return
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()
        if self._tracker is not None:
            self._tracker.log(step, {f"{kind}/{name}": value for name, value in values.items()})

    def step(self, step: int, line: str, **values: float | int | str | None) -> None:
        """Record one optimizer step, and show it: a line in a log, the bar on a terminal."""
        self.write("step", step, **values)
        if self._bar is not None:
            self._bar.update(self._task, completed=step + 1, description=line)
        else:
            self.say(line)
