"""Downloads in progress: a staging folder whose modification time shows other processes that they are alive.

Shards are fetched into `.tmp-fetch@<machine>.<pid>` in the folder of the corpus, verified there and renamed,
so a shard under its final name is complete. The time of the staging folder is renewed every few seconds, so
that a reader who misses a shard can distinguish one that is being fetched from one that nobody fetches, on
the same machine or over a shared disk. Ages are measured by the clock of the disk: ours may differ, or be
set back.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from nanochat.common import files, locks, stop_signals
from nanochat.common.checksums import BrokenFileError

PATTERN = f".tmp-{files.FETCHED}*"  # earlier releases put no machine into the name
BEAT_S = 2.0  # between renewals
STALE_S = 60.0  # without one: the download is dead
BEGIN_S = 15.0  # a download started a moment ago may still be loading its libraries
ARRIVE_S = 540.0  # that one shard is waited for; less than the 600 s that ranks wait for each other
POLL_S = 0.5


@contextlib.contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """Yield a folder within `folder` to fetch into; what dead downloads left there is deleted first."""
    stage = files.temporary(folder / files.FETCHED)
    folder.mkdir(parents=True, exist_ok=True)
    files.sweep_temporaries(folder)
    for left in folder.glob(PATTERN):
        if left == stage or not _lives(left):
            shutil.rmtree(left, ignore_errors=True)
    stage.mkdir()
    try:
        with locks.renewed(stage, BEAT_S):
            yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def is_under_way(folder: Path) -> bool:
    """True if a download into `folder` lives."""
    return any(_lives(stage) for stage in folder.glob(PATTERN))


def _lives(stage: Path) -> bool:
    """Whether a stage is renewed: its time is about now, neither long ago nor in the future."""
    try:
        age_s = files.disk_time(stage.parent) - stage.stat().st_mtime
    except OSError:
        return False
    return abs(age_s) < STALE_S and not files.is_abandoned(stage)


def has_begun(folder: Path) -> bool:
    """True if a download into `folder` lives, or comes to life within a moment."""
    return _poll(lambda: is_under_way(folder), BEGIN_S)


def wait_for(path: Path) -> None:
    """Wait, saying so, until a shard that is on its way has arrived.

    Raises:
        BrokenFileError: no download lives that could bring it, or it takes too long.
    """
    if not has_begun(path.parent):
        raise BrokenFileError(f"{path}: the shard is missing, and no download is under way.")
    print(f"{path.name} has not arrived yet: waiting for it", flush=True)
    started = time.monotonic()
    _poll(lambda: path.exists() or not is_under_way(path.parent), ARRIVE_S)
    waited_s = time.monotonic() - started
    if path.exists():
        print(f"{path.name} arrived after {waited_s:.0f} s", flush=True)
        return
    reason = "is too slow" if is_under_way(path.parent) else "has ended without it"
    raise BrokenFileError(f"{path}: the shard did not arrive in {waited_s:.0f} s; the download {reason}.")


def _poll(condition: Callable[[], bool], limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while not condition():
        if stop_signals.requested():  # a thread that waits on would keep the process alive
            raise stop_signals.Stopped
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True
