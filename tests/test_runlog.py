"""metrics.jsonl is the truth: always written, cut back on resume, unhurt by a tracker."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest

from nanochat.errors import UserError
from nanochat.runlog import RunLog, cut_back, read_metrics


def test_lines_are_objects_with_step_and_kind(tmp_path: Path) -> None:
    with RunLog(tmp_path, enabled=True, total_steps=2) as log:
        log.step(0, "a line", loss=2.5)
        log.write("eval", 1, val_bpb=1.25)
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"kind": "step", "step": 0, "loss": 2.5},
        {"kind": "eval", "step": 1, "val_bpb": 1.25},
    ]


def test_console_shows_the_line_in_a_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path, enabled=True, total_steps=1) as log:
        log.step(0, "step 1/1 | loss [2.5]", loss=2.5)
    assert "step 1/1 | loss [2.5]\n" in capsys.readouterr().out


def test_other_ranks_write_and_say_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path / "run", enabled=False, total_steps=1) as log:
        log.step(0, "x", loss=1.0)
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_resume_cuts_back_and_repairs_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"kind": "step", "step": step}) for step in range(6)]
    path.write_text("\n".join(lines) + '\n{"kind": "ste')
    with RunLog(tmp_path, enabled=True, total_steps=9, first_step=4) as log:
        log.step(4, "", loss=1.0)
    assert [entry["step"] for entry in read_metrics(path)] == [0, 1, 2, 3, 4]


def test_cut_back_of_an_absent_file_is_nothing(tmp_path: Path) -> None:
    cut_back(tmp_path / "metrics.jsonl", 3)
    assert list(tmp_path.iterdir()) == []


def test_bad_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
        read_metrics(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("failing", ["import", "init", "log", "finish"])
def test_failing_tracker_does_not_hurt_the_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failing: str,
) -> None:
    def call(name: str) -> None:
        if name == failing:
            raise ConnectionError("the tracker is down")

    tracker = types.SimpleNamespace(log=lambda *_, **__: call("log"), finish=lambda: call("finish"))

    def init(**_: object) -> object:
        call("init")
        return tracker

    module = None if failing == "import" else types.SimpleNamespace(init=init)
    monkeypatch.setitem(sys.modules, "wandb", module)
    with RunLog(tmp_path, enabled=True, total_steps=3) as log:
        log.start_tracker("online", "run", {}, tmp_path)
        for step in range(3):
            log.step(step, "", loss=1.0)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3
    assert capsys.readouterr().out.count("going on without it") == 1
