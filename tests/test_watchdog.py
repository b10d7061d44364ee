"""What the watchdog says of a rank that died, and of counts that differed before it began.

Hung and dead ranks of real runs are in tests/reliability.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from nanochat.distributed.watchdog import Watchdog
from nanochat.distributed.world import World


@pytest.mark.parametrize("last_note_is_read", [True, False])
def test_a_rank_is_gone_though_its_last_note_came_after_the_last_look(
    last_note_is_read: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A rank may die between its note and the next look at the notes: a new note is no sign of life."""
    store = dist.HashStore()
    ranks = [dataclasses.replace(World.single_process(), rank=rank, size=2, store=store) for rank in (0, 1)]
    alive, dead = (Watchdog(world, tmp_path, 2.0, lambda: "step 7") for world in ranks)
    for _ in range(3):
        for watchdog in (alive, dead):
            watchdog._leave_note()
        alive._read_notes()
    dead._leave_note()
    if last_note_is_read:
        alive._read_notes()
    alive._say_who_is_gone()
    told = capfd.readouterr().err
    assert told.startswith("rank 0: rank 1 (")
    assert "is gone; last seen at step 7" in told
    assert told.count("\n") == 1


class Counted(World):
    """A rank whose collectives are counted by hand: it waits for the others and adds nothing."""

    begun = 0
    meeting = threading.Barrier(2)

    def collectives_begun(self) -> int:
        return self.begun

    def any_rank(self, flag: bool) -> bool:
        self.meeting.wait()
        return flag

    def be_patient(self, timeout_s: float) -> None:
        """There is no backend."""


class Looked(Watchdog):
    """Watches only when the test looks: its thread would end the process."""

    def _watch(self) -> None:
        pass


def test_a_rank_that_has_counted_more_before_the_watch_keeps_nobody_waiting(tmp_path: Path) -> None:
    """Others measured their link, this rank had no part in it; then all pause for too long."""
    store = dist.HashStore()
    ranks = [
        Counted(**{**vars(World.single_process()), "rank": r, "size": 2, "store": store}) for r in (0, 1)
    ]
    object.__setattr__(ranks[1], "begun", 5)
    watchdogs = [Looked(world, tmp_path, 10.0, lambda: "step 7") for world in ranks]
    entering = [threading.Thread(target=watchdog.__enter__) for watchdog in watchdogs]
    for thread in entering:
        thread.start()
    for thread in entering:
        thread.join()
    watchdogs[0]._read_notes()
    for seen in watchdogs[0]._seen.values():
        seen.moved_at = time.monotonic() - 20.0
    assert watchdogs[0]._late() == {}
    object.__setattr__(ranks[1], "begun", 6)  # the pause is over for one: now the other is to blame
    watchdogs[1]._leave_note()
    watchdogs[0]._read_notes()
    assert set(watchdogs[0]._late()) == {0}
    leaving = [threading.Thread(target=watchdog.__exit__, args=(None, None, None)) for watchdog in watchdogs]
    for thread in leaving:
        thread.start()
    for thread in leaving:
        thread.join()
