"""What the watchdog says of a rank that died; hung and dead ranks of real runs are in tests/reliability."""

from __future__ import annotations

import dataclasses
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
