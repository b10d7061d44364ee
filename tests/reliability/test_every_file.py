"""P6: a call fails under each file that a running command writes; nothing computed is lost, one line says it.

The calls fail as on a full disk (ENOSPC), a bad one (EIO) and where no descriptor is left (EMFILE); the pipe
that standard output goes to is closed as `| head` does.
"""

from __future__ import annotations

import errno
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dev.fault_box import TINY, Box, Skip, expect_ok
from dev.fault_rows.core import EVAL, TEXTS, zipped
from nanochat.checkpoint import format as checkpoint_format

pytestmark = pytest.mark.slow

FULL, BAD, FEW = ("write", errno.ENOSPC), ("fsync", errno.EIO), ("open", errno.EMFILE)
FEW_TO_MAKE = ("create", errno.EMFILE)  # below a folder, which cannot be deleted without a descriptor
SCORED = [*TINY, "--eval-every=0", "--save-every=2", "--keep-last=9"]


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    made = Box(tmp_path / "box")
    made.tiny()
    try:
        made.faulty("write", "nothing", errno.EIO)
    except Skip as reason:
        pytest.skip(str(reason))
    yield made
    made.close()


def told(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What a command says of its troubles; that one is over is none."""
    lines = [*done.stdout.splitlines(), *done.stderr.splitlines()]
    return [x for x in lines if ("warning:" in x or "error:" in x) and "can be written again" not in x]


def disturbed(
    box: Box, fault: tuple[str, int], path: str, command: str, *flags: Any, code: int, times: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run a command whose calls on a file fail: the fault was met, one line tells of it, no traceback."""
    (op, error), met = fault, len(box.faults_met())
    done = box.run(command, *flags, env=box.faulty(op, path, error, times=times))
    assert len(box.faults_met()) > met, "no fault was met"
    assert done.returncode == code, f"exit code {done.returncode}: {done.stderr[-400:]}"
    assert "Traceback" not in done.stdout + done.stderr, done.stderr[-400:]
    assert len(told(done)) == 1, told(done)
    return done


def leftovers(folder: Path) -> list[str]:
    """Files of writes that were not finished."""
    return [path.name for path in folder.rglob(".tmp-*")]


def saved(run: Path) -> list[int]:
    """The steps of the checkpoints of a run, each of them whole."""
    found = sorted((run / "checkpoints").glob("step_*"))
    for folder in found:
        checkpoint_format.verify(folder)
    return [int(folder.name[5:]) for folder in found]


def logged(run: Path) -> list[int]:
    """The steps in the metrics of a run."""
    entries = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [entry["step"] for entry in entries if entry["kind"] == "step"]


def test_faults_under_the_files_of_base_train(box: Box, figure: Callable[..., Any]) -> None:
    """Where a file fails at the start, nothing was computed; later on the weights are saved all the same."""
    found = figure("P6", "faults under a file that base_train writes: saved, said once")
    cases: list[tuple[str, tuple[str, int], int, int]] = [
        ("/metrics.jsonl", FULL, 3, 0),
        ("/metrics.jsonl", ("write", errno.EIO), 3, 0),
        ("step_000004", FULL, 0, 0),
        ("step_000004", BAD, 0, 0),
        ("step_000004", FEW_TO_MAKE, 0, 0),
        ("metrics.jsonl", FEW, 0, 2),
        *(("config.json", fault, 0, 2) for fault in (FULL, BAD, FEW)),
        *((name, fault, 0, 0) for name in ("summary.json", "report.html") for fault in (FULL, BAD, FEW)),
    ]
    for number, (path, fault, times, code) in enumerate(cases):
        with found.trial(f"{path} {fault}"):
            flags = [*SCORED, "--num-iterations=6", f"--run=r{number}"]
            disturbed(box, fault, path, "base_train", *flags, code=code, times=times)
            run = box.base / "runs" / f"r{number}"
            assert not leftovers(run), leftovers(run)
            if code:
                assert not saved(run)
                continue
            assert saved(run) == ([2, 6] if path.startswith("step") else [2, 4, 6])
            assert logged(run) == list(range(6))
            for name in {"config.json", "summary.json", "report.html"} - {path}:
                assert (run / name).stat().st_size > 0, name
            assert path not in ("summary.json", "report.html") or not (run / path).exists()


def test_faults_under_the_files_of_base_eval(box: Box, figure: Callable[..., Any]) -> None:
    found = figure("P6", "faults under a file that base_eval writes: the scores are printed, said once")
    expect_ok(box.run("base_train", *SCORED, "--num-iterations=2", "--run=r"))
    bundle = box.folder / "bundle.zip"
    bundle.write_bytes(zipped({**TEXTS}))
    for path in ("core_predictions.jsonl", "base_eval.json"):
        for fault in (FULL, BAD, FEW):
            with found.trial(f"{path} {fault}"):
                flags = ["--run=r", *EVAL, f"--eval-bundle={bundle}"]
                done = disturbed(box, fault, path, "base_eval", *flags, code=2)
                assert "bits per byte, val" in done.stdout
                assert "CORE " in done.stdout
                assert not leftovers(box.base), leftovers(box.base)
                assert saved(box.base / "runs" / "r") == [2]
                for name in ("core_predictions.jsonl", "base_eval.json"):
                    (box.base / "runs" / "r" / name).unlink(missing_ok=True)


def test_faults_under_the_files_of_other_commands(box: Box, figure: Callable[..., Any]) -> None:
    """What was there before under the name stays as it was, byte for byte."""
    found = figure("P6", "faults under a file that tok_train, dataset or export writes: the old one stays")
    expect_ok(box.run("base_train", *SCORED, "--num-iterations=2", "--run=r"))
    text = box.folder / "new.txt"
    text.write_text("some other words\n" * 4000)
    local = ("dataset", "--corpus=local", "--name=n", "--files", text)
    cases: list[tuple[Path, str, tuple[Any, ...]]] = [
        (
            box.base / "tokenizers" / "tiny",
            "tokenizer.json",
            ("tok_train", "--corpus=tiny", "--vocab-size=290", "--overwrite"),
        ),
        (box.base / "data" / "n", "shard_0", local),
        (box.base / "data" / "n", "manifest.json", local),
        (
            box.folder / "exported",
            ".tmp-exported@",
            ("export", "--run=r", f"--out={box.folder / 'exported'}"),
        ),
    ]
    for folder, path, command in cases:
        before = contents(folder)
        for fault in (FULL, BAD, FEW_TO_MAKE if path.startswith(".tmp-") else FEW):
            with found.trial(f"{command[0]}: {path} {fault}"):
                disturbed(box, fault, path, *command, code=2)
                assert contents(folder) == before
                assert not leftovers(box.folder), leftovers(box.folder)


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder, by name; none where there is no folder."""
    return {path.name: path.read_bytes() for path in folder.glob("*") if path.is_file()}


def test_a_closed_pipe_under_standard_output(box: Box, figure: Callable[..., Any]) -> None:
    found = figure("P6", "commands whose reader of standard output has left: the work is done")
    (box.folder / "bundle.zip").write_bytes(zipped({**TEXTS}))
    text = box.folder / "new.txt"
    text.write_text("some other words\n" * 4000)
    runs = box.base / "runs" / "r"
    for command, made in (
        (f"scripts.base_train {' '.join(SCORED)} --num-iterations=6 --run=r", runs / "report.html"),
        (
            f"scripts.base_eval --run=r {' '.join(EVAL)} --eval-bundle={box.folder / 'bundle.zip'}",
            runs / "base_eval.json",
        ),
        (
            "scripts.tok_train --corpus=tiny --vocab-size=280 --name=t",
            box.base / "tokenizers/t/tokenizer.json",
        ),
        (
            f"scripts.dataset --corpus=local --name=n --files {text}",
            box.base / "data" / "n" / "manifest.json",
        ),
        (f"scripts.export --run=r --out={box.folder / 'out'}", box.folder / "out" / "model.safetensors"),
    ):
        with found.trial(command.split()[0]):
            done = box.shell(f"$PY -u -m {command} | true; exit ${{PIPESTATUS[0]}}")
            assert done.returncode == 0, f"{done.returncode}: {done.stderr[-400:]}"
            assert len(done.stderr.splitlines()) <= 1, done.stderr
            assert made.exists()
    assert saved(runs) == [2, 4, 6]
    assert logged(runs) == list(range(6))
