"""P3, P3b, P4: whenever a process is killed, what it leaves is a checkpoint or no checkpoint."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nanochat import checkpoint_files, files
from nanochat.checkpoint_files import MANIFEST, MODEL, OPTIMIZER, STATE, Snapshot, folder_of, steps_of
from nanochat.errors import UserError
from tests.conftest import REPO
from tests.dist.launch import digest, lines
from tests.reliability import record
from tests.reliability.crash import killed_before, operations
from tests.tiny import command_line, tiny_corpus, train_tiny

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")
RUN = "crash"
KILLS = int(os.environ.get("NANOCHAT_KILLS", "10"))  # of the storm; a kill takes 5 to 10 s


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
    checkpoint_files.prune(RUN, steps_of(RUN), keep_last=2)


# Ways to save that are wrong; each must be caught. They share the writing of single files.


def contents(shot: Snapshot, folder: Path, manifest: bool = True) -> None:
    checkpoint_files.save_tensors(folder / MODEL, shot.model)
    checkpoint_files.save_tensors(folder / OPTIMIZER, shot.optimizer)
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


def unusable(way: Callable[[int], None], base: Path) -> tuple[int, int, int]:
    """Kill before each operation of the third save: their number, those that leave nothing, steps lost."""
    shutil.rmtree(base, ignore_errors=True)
    way(2)
    way(4)
    shutil.copytree(base, base.with_name("before"), dirs_exist_ok=True)
    count = len(operations(lambda: way(6)))
    bad = worst = 0
    for n in range(count):
        shutil.rmtree(base)
        shutil.copytree(base.with_name("before"), base)
        killed_before(lambda: way(6), n)
        try:
            found = checkpoint_files.find(RUN, None, say=lambda _: None)
        except UserError:
            found = None
        bad += found is None
        if found is not None:
            worst = max(worst, 6 - int(found.name[-6:]))
        if way is save:  # and the run goes on over what was left
            save(8)
            assert steps_of(RUN)[-1] == 8
    shutil.rmtree(base.with_name("before"))
    return count, bad, worst


def test_a_kill_before_any_operation_leaves_a_whole_checkpoint(base_dir: Path) -> None:
    count, bad, worst = unusable(save, base_dir)
    assert count > 20
    assert bad == 0
    assert worst == 2  # the interval
    record(
        "P3",
        n=count,
        failures=bad,
        worst=worst,
        unit="kills before an operation on a file",
        note="worst: steps",
    )
    assert [path.name for path in files.checkpoints_dir(RUN).iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    "way", [in_place, prune_first, rename_early, manifest_first], ids=lambda way: way.__name__
)
def test_the_harness_catches_a_wrong_order(way: Callable[[int], None], base_dir: Path) -> None:
    count, bad, _ = unusable(way, base_dir)
    assert bad > 0
    unit = f"planted fault caught: {way.__name__}"
    record(
        "P3", n=1, failures=0, worst=bad, unit=unit, note=f"worst: of {count} kills, those that left nothing"
    )


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
    base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(2)
    save(4)
    trace = operations(lambda: save(6))
    assert violations(trace, 6) == []
    record(
        "P3b",
        n=len(trace),
        failures=0,
        worst=0,
        unit="operations of a save in the order that a power cut asks for",
    )
    for name in ("fsync_file", "fsync_dir"):
        with monkeypatch.context() as patch:
            patch.setattr(files, name, lambda path: None)
            assert violations(operations(lambda: save(8)), 8)


# ----------------------------------------------------------------------------------------------------
# P4


@pytest.fixture
def corpus(tmp_path: Path) -> None:
    tiny_corpus(tmp_path)


def killed_at_random(command: list[str], run: str, rng: random.Random, hunt: bool) -> bool:
    """Start, wait for a save, some time and, if asked, a save in progress; kill. False if it had ended."""
    folder, before = files.checkpoints_dir(run), max(steps_of(run), default=0)
    process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.DEVNULL)
    deadline, until = time.monotonic() + 100, 0.0
    while process.poll() is None and time.monotonic() < deadline:
        if not until and max(steps_of(run), default=0) > before:
            until = time.monotonic() + rng.uniform(0, 0.2)
        if until and time.monotonic() > until and not (hunt and not list(folder.glob(".tmp-*"))):
            break
        time.sleep(0.0005)
    alive = process.poll() is None
    process.kill()
    process.wait()
    return alive


@pytest.mark.slow
@pytest.mark.timeout(60 * KILLS)
def test_a_storm_of_kills_costs_little_and_changes_nothing(corpus: None) -> None:
    """One rank, a save every five steps: killed again and again at random, started with one command."""
    every, kills, in_save, worst, rng = 5, 0, 0, 0, random.Random(0)
    common = {"num_iterations": 40 * KILLS, "save_every": every, "eval_every": 50}
    train_tiny(run="whole", **common)
    flags = command_line(run="storm", resume="auto", **common)
    command = [sys.executable, "-m", "scripts.base_train", *flags]
    while kills < KILLS and killed_at_random(command, "storm", rng, hunt=kills % 2 == 0):
        kills += 1
        in_save += bool(list(files.checkpoints_dir("storm").glob(".tmp-*")))
        found = checkpoint_files.find("storm", None)
        assert found is not None
        done = (files.run_dir("storm") / "metrics.jsonl").read_text().splitlines()
        reached = max(int(line.split('"step": ')[1].split(",")[0]) for line in done if '"loss"' in line) + 1
        worst = max(worst, reached - int(found.name[-6:]))
    ended = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=400, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert kills == KILLS
    assert digest("storm", 40 * KILLS) == digest("whole", 40 * KILLS)
    assert lines("storm", "") == lines("whole", "")
    # Steps go on while a save is written, which is waited for before the next: fewer than two intervals.
    assert worst < 2 * every
    note = f"worst: steps done again, saving every {every}; {in_save} kills inside a save; same end"
    record("P4", n=kills, failures=0, worst=worst, unit="kill -9 at random moments, one rank", note=note)
