"""Damaged files of a run: what follows from others keeps nothing from going on, and each remedy helps."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nanochat.checkpoint import format as checkpoint_format
from nanochat.common import files, run_files
from nanochat.common.errors import UserError
from nanochat.report import write_report
from tests.tiny import tiny_corpus, train_tiny

DAMAGE = (b"", b"[]", b"null", b"3", b'{"status": 3, "steps": 12}', b"9" * 5000, b"\xff\xfe", b"[" * 50_000)


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A finished run."""
    tiny_corpus(tmp_path)
    train_tiny()
    return files.run_dir("tiny")


def test_a_damaged_summary_keeps_no_run_from_going_on(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run_files.read_summary("tiny")
    for contents in DAMAGE:
        (trained / "summary.json").write_bytes(contents)
        assert train_tiny(resume="auto")["steps"] == 12
        said = re.findall(r"passed over: .*", capsys.readouterr().out)
        assert len(said) == 1
        assert "summary.json" in said[0]
        again = run_files.read_summary("tiny")
        assert (again["status"], again["val_bpb"]) == (whole["status"], whole["val_bpb"])
    train_tiny(resume="auto")
    assert "is finished already" in capsys.readouterr().out


def test_the_remedy_for_a_damaged_configuration_makes_it_again(trained: Path) -> None:
    whole = run_files.read_config("tiny")
    model = checkpoint_format.folder_of("tiny", 12) / checkpoint_format.MODEL
    weights = model.read_bytes()
    (trained / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: .*Delete it and summary\.json.*--resume=auto"):
        write_report("tiny")
    for name in ("config.json", "summary.json"):
        (trained / name).unlink()
    train_tiny(resume="auto")
    write_report("tiny")
    again = run_files.read_config("tiny")
    assert {name: again[name] for name in ("model", "steps", "groups", "schedule")} == {
        name: whole[name] for name in ("model", "steps", "groups", "schedule")
    }
    assert model.read_bytes() == weights


def test_a_torn_configuration_keeps_no_run_from_going_on(trained: Path) -> None:
    (trained / "config.json").write_text('{"machine": {"launch": ')
    train_tiny(resume="auto", num_iterations=14, extend=True)
    assert run_files.read_config("tiny")["steps"] == 14


def test_scores_that_cannot_be_are_refused_by_name(trained: Path) -> None:
    task = {"centered": 0.1, "stderr": 0.1}
    for baseline in (1, 1.5, -0.1):
        files.write_json(trained / "base_eval.json", {"tasks": {"t": task | {"baseline": baseline}}})
        with pytest.raises(UserError, match=r"base_eval\.json: task t: baseline .*base_eval --run tiny"):
            run_files.read_scores("tiny")
