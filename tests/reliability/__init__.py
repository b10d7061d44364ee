"""Promises with figures: each test of one appends what it measured to reliability.json, where asked to.

NANOCHAT_RELIABILITY=reliability.json pytest tests --slow && python -m dev.reliability reliability.json
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
from pathlib import Path


def record(promise: str, *, n: int, failures: int, worst: float, unit: str, note: str = "") -> None:
    """Append one figure to the file that NANOCHAT_RELIABILITY names; without it, nothing.

    Args:
        promise: its number, "P5".
        n: trials.
        failures: how many of them broke the promise.
        worst: the worst that happened, in what `note` says; 0 where there is nothing to measure.
        unit: what a trial was.
        note: anything else worth a word.
    """
    if not (name := os.environ.get("NANOCHAT_RELIABILITY")):
        return
    path = Path(name)
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    entry = {"promise": promise, "n": n, "failures": failures, "worst": worst, "unit": unit, "note": note}
    with path.open("a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # several workers of pytest record into one file
        file.seek(0)
        text = file.read()
        entries = json.loads(text) if text else []
        kept = [old for old in entries if (old["promise"], old["unit"]) != (promise, unit)]
        file.truncate(0)
        file.write(json.dumps([*kept, {**entry, "machine": machine}], indent=1) + "\n")
