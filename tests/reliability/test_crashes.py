"""P3, P3b: whenever a process is killed, what it leaves is a checkpoint or no checkpoint."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat.checkpoint import format as checkpoint_format
from nanochat.checkpoint.format import MANIFEST, MODEL, OPTIMIZER, STATE, Snapshot, folder_of, steps_of
from nanochat.common import files
from nanochat.common.errors import UserError
from tests.reliability.crash import killed_before, operations

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")
RUN = "crash"


def snapshot(step: int) -> Snapshot:
    g = torch.Generator().manual_seed(step)
    return Snapshot(
        folder_of(RUN, step),
        {"w": torch.randn(50, 40, generator=g)},
        {"w.momentum": torch.randn(50, 40, generator=g)},
        {"step": step},
    )


def save(step: int) -> None:
    snapshot(step).write()
    checkpoint_format.prune(RUN, steps_of(RUN), keep_last=2)


# Ways to save that are wrong; each must be caught. They share the writing of single files.


def contents(shot: Snapshot, folder: Path, manifest: bool = True) -> None:
    checkpoint_format.save_tensors(folder / MODEL, shot.model)
    checkpoint_format.save_tensors(folder / OPTIMIZER, shot.optimizer)
    files.write_json(folder / STATE, {"format": 1, **shot.meta})
    if manifest:
        write_manifest(folder)


def write_manifest(folder: Path) -> None:
    listed = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": files.sha256(folder / name)}
        for name in (MODEL, OPTIMIZER, STATE)
    }
    files.write_json(folder / MANIFEST, {"format": 1, "files": listed})


def in_place(step: int) -> None:
    """Every checkpoint is written over the one before it, where readers look for it."""
    folder = folder_of(RUN, 2)
    folder.mkdir(parents=True, exist_ok=True)
    contents(snapshot(step), folder)


def prune_first(step: int) -> None:
    """The old ones go before the new one is there."""
    for old in steps_of(RUN):
        files.remove_dir(folder_of(RUN, old))
    snapshot(step).write()


def rename_early(step: int) -> None:
    """The folder takes its name before it is filled, and takes the place of the old ones."""
    folder = folder_of(RUN, step)
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_text("{}")
    for old in steps_of(RUN)[:-1]:
        files.remove_dir(folder_of(RUN, old))
    contents(snapshot(step), folder)


def manifest_first(step: int) -> None:
    """The manifest is written, and the old ones go, before the tensors have reached their place."""
    shot, folder, aside = snapshot(step), folder_of(RUN, step), files.run_dir(RUN) / "aside"
    aside.mkdir(parents=True, exist_ok=True)
    contents(shot, aside)
    folder.mkdir(parents=True)
    (aside / MANIFEST).rename(folder / MANIFEST)
    for old in steps_of(RUN)[:-1]:
        files.remove_dir(folder_of(RUN, old))
    for name in (MODEL, OPTIMIZER, STATE):
        (aside / name).rename(folder / name)


def branch_left(step: int) -> None:
    """Save on another branch: what there is of later steps is set aside before."""
    if step == 6:
        checkpoint_format.set_aside(RUN, 4)
    save(step)


def unusable(way: Callable[[int], None], base: Path, trial: Callable[[str], Any]) -> tuple[int, int]:
    """Kill before each operation of the third save: their number, and the most steps lost."""
    shutil.rmtree(base, ignore_errors=True)
    way(2)
    way(4)
    if way is branch_left:
        for step in (8, 10):
            snapshot(step).write()
    shutil.copytree(base, base.with_name("before"), dirs_exist_ok=True)
    trace = operations(lambda: way(6))
    worst = 0
    for n, operation in enumerate(trace):
        shutil.rmtree(base)
        shutil.copytree(base.with_name("before"), base)
        killed_before(lambda: way(6), n)
        with trial(f"before {operation}"):
            found = checkpoint_format.find(RUN, None, say=lambda _: None)
            assert found is not None
            worst = max(worst, 6 - int(found.name[-6:]))
            if way in (save, branch_left):  # and the run goes on over what was left
                checkpoint_format.set_aside(RUN, int(found.name[-6:]))
                save(16)
                assert steps_of(RUN)[-1] == 16
                assert len(checkpoint_format.retained(RUN, 16)) == 2
                assert not list(files.checkpoints_dir(RUN).glob(".*"))
    shutil.rmtree(base.with_name("before"))
    return len(trace), worst


@pytest.mark.parametrize("way", [save, branch_left], ids=lambda way: way.__name__)
def test_a_kill_before_any_operation_leaves_a_whole_checkpoint(
    way: Callable[[int], None], base_dir: Path, figure: Any
) -> None:
    found = figure("P3", f"kills before an operation on a file: {way.__name__}", independent=False)
    count, worst = unusable(way, base_dir, found.trial)
    assert count > 20
    assert worst == 2  # the interval
    found.measure(worst, "steps lost, saving every 2")


@pytest.mark.parametrize(
    "way", [in_place, prune_first, rename_early, manifest_first], ids=lambda way: way.__name__
)
def test_the_harness_catches_a_wrong_order(way: Callable[[int], None], base_dir: Path) -> None:
    left: list[str] = []

    @contextlib.contextmanager
    def trial(label: str) -> Iterator[None]:
        try:
            yield
        except (AssertionError, UserError):
            left.append(label)

    unusable(way, base_dir, trial)
    assert left


def violations(trace: list[tuple[str, str]], step: int) -> list[str]:
    """What a power cut could undo: bytes or names that are not on the disk before what relies on them."""
    final = str(folder_of(RUN, step))
    at = next(i for i, (name, path) in enumerate(trace) if name == "rename" and path.endswith(f"-> {final}"))
    source = trace[at][1].split(" -> ")[0]
    synced = [(i, path) for i, (name, path) in enumerate(trace) if name == "fsync"]
    wrong = []
    for name in (MODEL, OPTIMIZER, STATE, MANIFEST):
        path = f"{source}/{name}"
        writes = [
            i
            for i, (op, where) in enumerate(trace)
            if (op in ("open", "write", "second half") and where == path) or where.endswith(f"-> {path}")
        ]
        if not any(max(writes) < i < at for i, where in synced if where == path):
            wrong.append(f"{name} is renamed before it is on the disk")
    if not any(i < at for i, where in synced if where == source):
        wrong.append("the folder is renamed before its names are on the disk")
    after = next((i for i, where in synced if i > at and where == str(Path(final).parent)), len(trace))
    removals = [i for i, (op, where) in enumerate(trace) if op == "rename" and "/.old-" in where]
    if after == len(trace):
        wrong.append("the new name is never put on the disk")
    if any(i < after for i in removals):
        wrong.append("an old one goes before the new name is on the disk")
    return wrong


def test_everything_is_on_the_disk_before_what_relies_on_it(
    base_dir: Path, monkeypatch: pytest.MonkeyPatch, figure: Any
) -> None:
    save(2)
    save(4)
    found = figure("P3b", "orders of a save's operations that a power cut asks for", independent=False)
    with found.trial():
        assert violations(operations(lambda: save(6)), 6) == []
    flush = files.fsync
    for of_folders in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(files, "fsync", lambda path, of=of_folders: path.is_dir() == of or flush(path))
            assert violations(operations(lambda: save(8)), 8)
