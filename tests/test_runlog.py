"""metrics.jsonl is the truth: always written, cut back on resume, unhurt by a tracker."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from nanochat.common.errors import UserError
from nanochat.common.run_files import MetricsLine, cut_back, read_lines
from nanochat.train.run_log import RunLog
from tests.tiny import read_metrics


def test_lines_are_objects_with_step_and_kind(tmp_path: Path) -> None:
    with closing(RunLog(tmp_path, enabled=True)) as log:
        log.record("step", 0, "a line", loss=2.5)
        log.record("eval", 1, "", val_bpb=1.25)
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"kind": "step", "step": 0, "loss": 2.5},
        {"kind": "eval", "step": 1, "val_bpb": 1.25},
    ]


def test_console_shows_the_line_in_a_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(RunLog(tmp_path, enabled=True)) as log:
        log.record("step", 0, "step 1/1 | loss [2.5]", loss=2.5)
    assert "step 1/1 | loss [2.5]\n" in capsys.readouterr().out


def test_other_ranks_write_and_say_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(RunLog(tmp_path / "run", enabled=False)) as log:
        log.record("step", 0, "x", loss=1.0)
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_resume_cuts_back_and_repairs_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"kind": "step", "step": step}) for step in range(6)]
    path.write_text("\n".join(lines) + '\n{"kind": "ste')
    with closing(RunLog(tmp_path, enabled=True, first_step=4)) as log:
        log.record("step", 4, "", loss=1.0)
    assert [entry["step"] for entry in read_metrics(path)] == [0, 1, 2, 3, 4]


def test_cut_back_of_an_absent_file_is_nothing(tmp_path: Path) -> None:
    cut_back(tmp_path / "metrics.jsonl", 3)
    assert list(tmp_path.iterdir()) == []


def test_a_bad_line_of_other_files_is_named(tmp_path: Path) -> None:
    for bad in ("nonsense", "3", "[]", '{"a": 1, "a": 2}', "\0", "9" * 5000, "[" * 50_000):
        (tmp_path / "lines.jsonl").write_text(f'{{"id": 1}}\n{bad}\n')
        with pytest.raises(UserError, match=r"lines\.jsonl, line 2"):
            read_lines(tmp_path / "lines.jsonl", dict)


def test_a_file_without_any_line_that_can_be_read_has_none(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b"\0" * 4096)
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    assert read_metrics(tmp_path / "absent.jsonl") == []


DAMAGE = {
    "half a last line": b'{"kind": "step", "st',
    "a block of NUL": b"\0" * 4096 + b"\n",
    "NUL before a line": b"\0\0\0" + b'{"kind": "step", "step": 2}\n',
    "bad UTF-8": b'{"kind": "sample", "step": 1, "text": "\xff\xfe"}\n',
    "a blank line": b"\n",
    "a list": b"[1, 2]\n",
    "no step": b'{"kind": "step"}\n',
    "a step that is a text": b'{"kind": "step", "step": "3"}\n',
    "5,000 digits": b'{"kind": "step", "step": 1, "loss": ' + b"9" * 5000 + b"}\n",
    "brackets": b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_lines_are_left_out_and_the_rest_is_used(tmp_path: Path, damage: bytes) -> None:
    """A crash leaves them; neither the report nor a resume may stop at them."""
    path = tmp_path / "metrics.jsonl"
    whole = [{"kind": "step", "step": step, "loss": 1.5} for step in range(3)]
    path.write_bytes("".join(json.dumps(entry) + "\n" for entry in whole).encode() + damage)
    notes: list[str] = []
    assert read_lines(path, MetricsLine, notes) == whole
    assert [note.count("Left out: 1 lines") for note in notes] == ([] if damage == b"\n" else [1])
    cut_back(path, 2)
    notes.clear()
    assert read_lines(path, MetricsLine, notes) == whole[:2]
    assert notes == []


def test_a_nan_in_the_metrics_is_read(tmp_path: Path) -> None:
    with closing(RunLog(tmp_path, enabled=True)) as log:
        log.record("step", 0, "", loss=float("nan"))
    assert math.isnan(read_metrics(tmp_path / "metrics.jsonl")[0]["loss"])


def test_metrics_that_are_gone_on_a_resume_are_missed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with closing(RunLog(tmp_path, enabled=True, first_step=4)):
        pass
    assert "begins at step 4" in capsys.readouterr().err


def failing(monkeypatch: pytest.MonkeyPatch, fails: Callable[[], bool], most: int = 1 << 30) -> None:
    """os.write answers ENOSPC while `fails`, after writing `most` bytes of what it was given."""
    real = os.write

    def write(descriptor: int, data: bytes) -> int:
        if not fails():
            return real(descriptor, data)
        if most < len(data) and not write.halved:  # type: ignore[attr-defined]
            write.halved = True  # type: ignore[attr-defined]
            return real(descriptor, data[:most])
        raise OSError(errno.ENOSPC, "No space left on device")

    write.halved = False  # type: ignore[attr-defined]
    monkeypatch.setattr(os, "write", write)


@pytest.mark.parametrize("most", [0, 1, 7, 1 << 30])
def test_lines_that_cannot_be_written_are_kept_and_come_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], most: int
) -> None:
    at: list[int] = [0]
    failing(monkeypatch, lambda: 3 <= at[0] < 7, most)
    with closing(RunLog(tmp_path, enabled=True)) as log:
        for step in range(10):
            at[0] = step
            log.record("step", step, "", loss=1.0)
    assert [entry["step"] for entry in read_metrics(tmp_path / "metrics.jsonl")] == list(range(10))
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2
    assert "No space left on device; the run goes on" in told[0]
    assert "can be written again" in told[1]


def test_lines_that_never_could_be_written_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("nanochat.train.run_log.KEPT_BYTES", 100)
    failing(monkeypatch, lambda: True)
    with closing(RunLog(tmp_path, enabled=True)) as log:
        for step in range(10):
            log.record("step", step, "", loss=1.0)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2
    assert "the last 10 lines could not be written" in told[1]


WANDB = """
class Run:
    def log(self, *args, **options):
        {log}
    def finish(self):
        {finish}
def init(**options):
    {init}
    return Run()
"""
FAILING = {
    "import": "raise ImportError('No module named wandb')",
    "init": WANDB.format(init="raise ConnectionError('down')", log="pass", finish="pass"),
    "log": WANDB.format(init="pass", log="raise ConnectionError('down')", finish="pass"),
    "finish": WANDB.format(init="pass", log="pass", finish="raise ConnectionError('down')"),
    "exit": WANDB.format(init="import sys; sys.exit(3)", log="pass", finish="pass"),
    "kill": WANDB.format(init="import os; os.kill(os.getpid(), 9)", log="pass", finish="pass"),
}


def install_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """A module wandb that the tracker's process imports."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "wandb.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"), prepend=os.pathsep)


@pytest.mark.parametrize("code", FAILING.values(), ids=FAILING)
def test_failing_tracker_does_not_hurt_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: str
) -> None:
    install_wandb(tmp_path, monkeypatch, code)
    with closing(RunLog(tmp_path, enabled=True, wandb="online")) as log:
        for step in range(3):
            log.record("step", step, "", loss=1.0)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3
    assert capsys.readouterr().out.count("going on without it") == 1


def test_a_tracker_gets_every_line_and_cannot_touch_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It changes what a library may change of its process, and leaves a hook that hangs."""
    seen = tmp_path / "seen"
    init = (
        "import atexit, os, sys, time; os.chdir('/'); os.environ.clear(); sys.stdout = None; "
        "atexit.register(time.sleep, 1000)"
    )
    log = f"print(*args, options, file=open({str(seen)!r}, 'a'))"
    install_wandb(tmp_path, monkeypatch, WANDB.format(init=init, log=log, finish="pass"))
    before = (Path.cwd(), dict(os.environ), sys.stdout)
    with closing(RunLog(tmp_path, enabled=True, wandb="online")) as run_log:
        for step in range(3):
            run_log.record("step", step, "", loss=1.5)
    assert (Path.cwd(), dict(os.environ), sys.stdout) == before
    assert seen.read_text().splitlines() == [f"{{'step/loss': 1.5}} {{'step': {step}}}" for step in range(3)]
    assert "going on without it" not in capsys.readouterr().out
