"""Figures of the promises: trials that can fail, written when the test is torn down, failures included.

NANOCHAT_RELIABILITY=reliability.json pytest tests --slow && python -m dev.reliability reliability.json
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dev.reliability import library_digest

MakeFigure = Callable[
    ..., "Figure"
]  # what the fixture `figure` gives: figure(promise, unit, independent=True)
REPO = Path(__file__).resolve().parents[2]


class Figure:
    """How often one promise was tried in one way, and how often it was broken.

    Trials that share everything but a position in one deterministic order say no more than one of them:
    such a figure is `independent=False`, and counts as one trial however many checks it makes.
    """

    def __init__(self, promise: str, unit: str, independent: bool) -> None:
        """Nothing tried yet of `promise` ("P5"); `unit` says what a trial is."""
        self.promise, self.unit, self.independent = promise, unit, independent
        self.checks, self.worst, self.note = 0, 0.0, ""
        self.failed: list[str] = []

    @contextlib.contextmanager
    def trial(self, label: object = "") -> Iterator[None]:
        """One trial. An exception in it is a failure that is counted; the next trial still runs."""
        self.checks += 1
        try:
            yield
        except (Exception, pytest.fail.Exception) as error:
            self.failed.append(f"{label}: {type(error).__name__}: {error}")

    def measure(self, value: float, what: str) -> None:
        """Keep the worst (highest) of what was measured; `what` says what it is: "steps done again"."""
        self.worst, self.note = max(self.worst, value), what

    def entry(self) -> dict[str, object]:
        """The line of reliability.json."""
        broken = bool(self.failed)
        return {
            "promise": self.promise,
            "unit": self.unit,
            "n": self.checks if self.independent else 1,
            "checks": self.checks,
            "failures": len(self.failed) if self.independent else int(broken),
            "worst": self.worst,
            "note": self.note,
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            "commit": _commit(),
            "library": library_digest(REPO),
        }


def _commit() -> str:
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPO, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def write_entry(path: Path, entry: dict[str, object]) -> None:
    """Put one entry into the file; an older one of the same promise and unit goes."""
    with path.open("a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # several workers of pytest write into one file
        file.seek(0)
        text = file.read()
        key = (entry["promise"], entry["unit"])
        kept = [old for old in (json.loads(text) if text else []) if (old["promise"], old["unit"]) != key]
        entries = sorted([*kept, entry], key=lambda e: (str(e["promise"]), str(e["unit"])))
        file.truncate(0)
        file.write(json.dumps(entries, indent=1) + "\n")


def close(figures: list[Figure], outcome: str) -> None:
    """Write every figure where NANOCHAT_RELIABILITY says; fail the test whose trials failed.

    Args:
        figures: those of one test. One without trials has the whole test for its only one.
        outcome: of the body of the test: "passed", "failed" or "skipped".
    """
    for figure in figures:
        if outcome == "failed" and not figure.failed:  # whatever stopped it, not all trials were passed
            figure.checks += 1
            figure.failed.append("the test itself failed")
        elif outcome == "passed" and not figure.checks:
            figure.checks = 1
        if figure.checks and (name := os.environ.get("NANOCHAT_RELIABILITY")):
            write_entry(Path(name), figure.entry())
    if broken := [figure for figure in figures if figure.failed]:
        lines = [f"{f.promise} {f.unit}: {len(f.failed)} of {f.checks} failed" for f in broken]
        pytest.fail("\n".join([*lines, *(text for f in broken for text in f.failed[:5])]), pytrace=False)
