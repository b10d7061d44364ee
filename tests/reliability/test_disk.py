"""P6: a full disk or a read-only folder costs nothing but the save; the earlier checkpoints stay."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat.checkpoint import format as checkpoint_format
from nanochat.checkpoint.format import Snapshot, folder_of, steps_of, verify
from nanochat.common import files

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits and mounts of Linux")
RUN = "disk"


def snapshot(step: int, elements: int = 10_000) -> Snapshot:
    g = torch.Generator().manual_seed(step)
    tensors = {"w": torch.randn(elements, generator=g)}
    return Snapshot(folder_of(RUN, step), tensors, {"w.momentum": tensors["w"] + 1}, {"step": step})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def in_child(action: Callable[[], None]) -> None:
    """Run it in a fork, whose limits end with it."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0


def test_a_file_that_cannot_grow_costs_only_its_save(figure: Any) -> None:
    """The limit is at each tenth of the tensor file; when it is lifted, the next save succeeds."""
    found = figure("P6", "saves into a file that may not grow: earlier one whole, no leftover")
    snapshot(2).write()
    size = (folder_of(RUN, 2) / checkpoint_format.MODEL).stat().st_size
    for tenth in range(10):

        def limited(limit: int = size * tenth // 10) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            with pytest.raises(OSError, match="step_000004"):
                snapshot(4).write()
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            assert names(files.checkpoints_dir(RUN)) == ["step_000002"]
            snapshot(4).write()
            verify(folder_of(RUN, 4))

        with found.trial(f"{tenth} tenths"):
            in_child(limited)
            verify(folder_of(RUN, 2))
            shutil.rmtree(folder_of(RUN, 4))


@pytest.fixture
def small_disk(base_dir: Path) -> Iterator[Path]:
    """A disk of 300 kB at the place of the checkpoints."""
    place = files.checkpoints_dir(RUN)
    place.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(place)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_fills_up_costs_only_the_save(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, figure: Any
) -> None:
    found = figure("P6", "saves to a disk that fills up: earlier one whole, no leftover")
    with monkeypatch.context() as patch:  # else the check for space refuses before anything is written
        patch.setattr(checkpoint_format, "SPARE_BYTES", -10_000_000)
        snapshot(2).write()
        for elements in (30_000, 40_000, 60_000):
            with found.trial(elements):
                with pytest.raises(OSError) as refused:
                    snapshot(4, elements).write()
                assert refused.value.errno in (errno.ENOSPC, None)
                assert names(small_disk) == ["step_000002"]
                verify(folder_of(RUN, 2))
        snapshot(4).write()
    assert steps_of(RUN) == [2, 4]


def test_too_little_space_is_said_before_anything_is_written(small_disk: Path) -> None:
    with pytest.raises(ValueError, match=r"needs 67,188,864 bytes and 307,200 are free"):
        snapshot(2).write()
    assert names(small_disk) == []


def test_a_folder_turned_read_only_costs_only_the_save(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, figure: Any
) -> None:
    monkeypatch.setattr(checkpoint_format, "SPARE_BYTES", 0)
    snapshot(2).write()
    with figure("P6", "saves to a folder turned read-only: earlier one whole").trial():
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
        with pytest.raises(OSError, match="Read-only"):
            snapshot(4).write()
        verify(folder_of(RUN, 2))
        subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
        snapshot(4).write()
        assert steps_of(RUN) == [2, 4]
