"""Watchdog: a rank that hangs or dies ends the run, with its number, its line of code and all stacks.

Collectives cannot tell: the ranks that wait report a time-out, and torchrun blames the first to leave. So a
thread of each rank leaves a note in the store every second: how many collectives its rank has begun, and
where it is. Whoever has begun fewer than another keeps that one waiting; whoever leaves no note is gone.

Time in which this process itself did not run (Ctrl-Z, `docker pause`, a laptop that is closed) is nobody's
fault and does not count. The backend's own time-out would count it, and those who wait in a collective just
then would leave: so while the watchdog watches, gloo has PATIENCE_S instead.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from nanochat.distributed.world import BACKSTOP_S, World

HUNG = 70  # exit code: EX_SOFTWARE
BEAT_S = 1.0  # between two notes, at most; a tenth of the time-out where that is less
DONE = "done"  # what a rank says that leaves in good order
LEFT_S = 10.0  # after a rank has left with an error: the others may be about to leave with the same
LEAVE_S = 0.5  # for the others to write their stacks before the first leaves and torchrun kills the rest
PATIENCE_S = 86_400.0  # of gloo while we watch
SLEPT = 0.25  # of the time-out between two beats: this process was stopped
PACKAGE = str(Path(__file__).parents[1])


@dataclass
class _Seen:
    """What this rank knows of another, and since when."""

    note: dict[str, Any]
    beat_at: float
    moved_at: float


class Watchdog:
    """Watches the ranks of a run while it is entered; with one rank there is nothing to watch."""

    def __init__(self, world: World, folder: Path, timeout_s: float, where: Callable[[], str]) -> None:
        """Nothing is started yet.

        Args:
            world: the ranks.
            folder: gets stack_rank<r>.txt of every rank when one hangs.
            timeout_s: how long a rank may keep the others waiting, or leave no note.
            where: says what the run is at, such as "step 12".
        """
        self._world, self._where, self._timeout_s = world, where, timeout_s
        self._stack = folder / f"stack_rank{world.rank}.txt"
        self._beat_s = min(BEAT_S, timeout_s / 10)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._seen: dict[int, _Seen] = {}
        self._beats = 0
        self._begun_before = 0

    def __enter__(self) -> Watchdog:
        """Start to watch; all ranks do."""
        if self._world.store is not None:  # ranks that torchrun has started
            # All ranks are at one place, whatever their backends have counted: of links between pairs of
            # ranks, NCCL counts those that a rank has a part in.
            self._begun_before = self._world.collectives_begun()
            self._leave_note()
            self._world.any_rank(False)  # from here on every rank has left a note
            self._read_notes()
            self._file = self._stack.open("w", encoding="utf-8")
            self._world.be_patient(PATIENCE_S)
            self._arm()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Stop watching. If a collective has failed, say which rank is the reason."""
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        if error is None:
            self._world.any_rank(False)  # the store may go only when nobody leaves notes any more
        if isinstance(error, RuntimeError):
            self._say_who_is_gone()
        else:
            with contextlib.suppress(RuntimeError):
                self._leave_note(left=DONE if error is None else f"{type(error).__name__}: {error}"[:500])
        self._file.close()
        if error is None or not self._stack.stat().st_size:  # a sleep that was slept well leaves stacks too
            self._stack.unlink(missing_ok=True)

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._stop.wait(self._beat_s):
            self._arm()
            before, last = time.monotonic(), before
            if self._slept(before - last):
                self._wake(before, before - last)
            try:
                self._leave_note()
                self._read_notes()
            except RuntimeError as error:  # torch's errors of the store are
                if self._slept(time.monotonic() - before):
                    continue  # its time-out ran while we slept: the next round sees the gap
                self._end(f"the launcher of the run does not answer any more ({error})", True, True)
            if self._slept(time.monotonic() - before):
                continue  # the notes are from before the sleep
            if waited := self._all_wait():
                self._end(f"all ranks wait in one collective for {waited:.0f} s", self._world.is_main, True)
            if late := self._late():
                speaker = min(self._seen.keys() - late.keys(), default=0)
                self._end("\n".join(late.values()), self._world.rank == speaker, self._world.rank in late)

    def _slept(self, gap_s: float) -> bool:
        """Whether this process was stopped, by how long two lines of it were apart."""
        return gap_s > max(SLEPT * self._timeout_s, 2 * self._beat_s)

    def _wake(self, now: float, slept_s: float) -> None:
        """Begin to wait anew: the others slept too, or will be found late by what they do from here on."""
        for seen in self._seen.values():
            seen.beat_at = seen.moved_at = now
        if self._world.is_main:
            self._say(f"this process did not run for {slept_s:.0f} s; that does not count")

    def _arm(self) -> None:
        """If no thread of Python runs for so long, this one of C still writes the stack.

        It does not leave: it cannot tell that from a sleep of the process. The others can.
        """
        faulthandler.dump_traceback_later(self._timeout_s + 2 * self._beat_s, file=self._file)

    def _leave_note(self, left: str = "") -> None:
        self._beats += 1
        main = sys._current_frames()[threading.main_thread().ident or 0]
        file = main.f_code.co_filename
        note = {
            "beats": self._beats,
            "begun": self._world.collectives_begun() - self._begun_before,
            "where": f"{self._where()}{_line(main)}",
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "left": left,
            "waits": file.endswith("collectives.py") or "distributed_c10d" in file,
        }
        self._world.store.set(f"watchdog/{self._world.rank}", json.dumps(note))

    def _read_notes(self) -> None:
        keys = [f"watchdog/{rank}" for rank in range(self._world.size)]
        now = time.monotonic()
        for rank, text in enumerate(self._world.store.multi_get(keys)):
            note = json.loads(text)
            seen = self._seen.setdefault(rank, _Seen(note, now, now))
            if note["beats"] != seen.note["beats"]:
                seen.beat_at = now
            if note["begun"] != seen.note["begun"]:
                seen.moved_at = now
            seen.note = note

    def _all_wait(self) -> float:
        """How long all ranks have waited in the same collective, if that is too long: the link is stuck."""
        now, seen = time.monotonic(), list(self._seen.values())
        same = len({one.note["begun"] for one in seen}) == 1 and all(one.note["waits"] for one in seen)
        waited = now - max(one.moved_at for one in seen)
        return waited if same and waited > self._timeout_s + BACKSTOP_S else 0.0

    def _late(self) -> dict[int, str]:
        """What is to be said of each rank that the others have waited for too long."""
        now, most = time.monotonic(), max(seen.note["begun"] for seen in self._seen.values())
        late = {}
        for rank, seen in self._seen.items():
            left, silent_s, still_s = seen.note["left"], now - seen.beat_at, now - seen.moved_at
            if left:
                if left != DONE and silent_s > LEFT_S:
                    late[rank] = _describe(rank, seen, f"has left: {left};")
            elif silent_s > self._timeout_s:
                late[rank] = _describe(rank, seen, f"gives no sign of life for {silent_s:.0f} s; last seen")
            elif seen.note["begun"] < most and still_s > self._timeout_s:
                waited = _describe(rank, seen, f"has kept the others waiting for {still_s:.0f} s,")
                late[rank] = f"{waited}; its stack is in stack_rank{rank}.txt"
        return late

    def _say_who_is_gone(self) -> None:
        """After a collective has failed: name the rank that leaves no more notes, or says so."""
        deadline = time.monotonic() + 3 * self._beat_s
        with contextlib.suppress(RuntimeError):
            self._read_notes()  # those that the watch has read may be older than the last of who is gone
        before = {rank: seen.note["beats"] for rank, seen in self._seen.items()}
        with contextlib.suppress(RuntimeError):
            while time.monotonic() < deadline:
                self._leave_note()
                time.sleep(self._beat_s / 4)
            self._read_notes()
        for rank, seen in self._seen.items():
            if seen.note["left"] not in ("", DONE):
                self._say(_describe(rank, seen, f"has left: {seen.note['left']};"))
            elif rank != self._world.rank and seen.note["beats"] == before[rank]:
                self._say(_describe(rank, seen, "is gone; last seen"))

    def _say(self, text: str) -> None:
        print(f"rank {self._world.rank}: {text}", file=sys.stderr, flush=True)

    def _end(self, text: str, speak: bool, first: bool) -> None:
        """Write the stacks and leave; who is to blame leaves first: torchrun blames that one."""
        faulthandler.dump_traceback(file=self._file)
        self._file.flush()
        if speak:
            self._say(text)
        time.sleep(LEAVE_S + (self._beat_s if first else 3 * self._beat_s))
        os._exit(HUNG)


def _describe(rank: int, seen: _Seen, what: str) -> str:
    note = seen.note
    return f"rank {rank} ({note['host']}, process {note['pid']}) {what} at {note['where']}"


def _line(frame: FrameType) -> str:
    """The innermost line of this package that a thread is at, given its innermost frame, or ""."""
    for at, number in traceback.walk_stack(frame):
        if at.f_code.co_filename.startswith(PACKAGE):
            return f", in {at.f_code.co_name} ({Path(at.f_code.co_filename).name}, line {number})"
    return ""
