"""Saving beside training: retention, cadence by the clock, failures that are told of and survived."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanochat import checkpoint, checkpoint_files, files, saver, train
from nanochat.errors import UserError
from tests.tiny import tiny_corpus, train_tiny


@pytest.fixture(autouse=True)
def corpus(tmp_path: Path) -> None:
    tiny_corpus(tmp_path)


def test_retention_keeps_the_last_and_every_nth() -> None:
    train_tiny(save_every=2, keep_last=1, keep_every=6, num_iterations=16, eval_every=0)
    assert checkpoint_files.steps_of("tiny") == [6, 12, 16]


def test_a_save_does_not_hold_training_up_and_holds_the_state_of_its_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The write of step 4 is held until step 7 has been done; what it then writes is step 4's."""
    train_tiny(run="plain", keep_last=9)
    go_on, real_write, real_step = threading.Event(), checkpoint_files.Snapshot.write, train.train_step

    def held(snapshot: checkpoint_files.Snapshot) -> float:
        assert go_on.wait(60)
        return real_write(snapshot)

    def step(plan: Any, state: Any, world: Any) -> Any:
        result = real_step(plan, state, world)
        if state.step == 6:
            go_on.set()
        return result

    monkeypatch.setattr(checkpoint_files.Snapshot, "write", held)
    monkeypatch.setattr(train, "train_step", step)
    train_tiny(run="held", keep_last=9)
    for at in (4, 8, 12):
        for name in (checkpoint_files.MODEL, checkpoint_files.OPTIMIZER):
            plain, held_file = (checkpoint_files.folder_of(run, at) / name for run in ("plain", "held"))
            assert plain.read_bytes() == held_file.read_bytes()


def test_a_snapshot_shares_no_memory_with_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def look(state: checkpoint.TrainState, *rest: Any) -> Any:
        snapshot = real(state, *rest)
        assert snapshot is not None
        with torch.no_grad():
            for name, parameter in state.model.named_parameters():
                assert snapshot.model[name].data_ptr() != parameter.data_ptr()
        moments = state.optimizer.state_tensors()
        assert all(snapshot.optimizer[name].data_ptr() != t.data_ptr() for name, t in moments.items())
        seen.append(state.step)
        return snapshot

    real = checkpoint.take
    monkeypatch.setattr(checkpoint, "take", look)
    train_tiny()
    assert seen == [4, 8, 12]


def test_minutes_save_too(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(saver, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    real_step = train.train_step

    def slow(*args: Any) -> Any:
        clock[0] += 61.0
        return real_step(*args)

    monkeypatch.setattr(train, "train_step", slow)
    train_tiny(save_every=0, save_minutes=5, keep_last=9, num_iterations=12)
    assert checkpoint_files.steps_of("tiny") == [5, 10, 12]


def failing(monkeypatch: pytest.MonkeyPatch, bad_steps: set[int]) -> None:
    """Where a checkpoint of these steps should go, there is a file in the way of its temporary folder."""
    real_write = checkpoint_files.Snapshot.write

    def write(snapshot: checkpoint_files.Snapshot) -> float:
        if snapshot.meta["step"] in bad_steps:
            parent = snapshot.folder.parent
            parent.rename(parent.with_name("aside"))
            parent.touch()
            try:
                return real_write(snapshot)
            finally:
                parent.unlink()
                parent.with_name("aside").rename(parent)
        return real_write(snapshot)

    monkeypatch.setattr(checkpoint_files.Snapshot, "write", write)


def test_a_save_that_fails_costs_only_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, {4, 6})
    train_tiny(save_every=2, keep_last=9)
    assert checkpoint_files.steps_of("tiny") == [2, 8, 10, 12]
    told = capsys.readouterr().out
    assert "warning: step_000004 was not saved" in told
    assert "warning: step_000006 was not saved" in told


def test_three_failures_in_a_row_stop_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, {4, 6, 8})
    with pytest.raises(UserError, match="3 saves in a row have failed"):
        train_tiny(save_every=2, keep_last=9)
    assert checkpoint_files.steps_of("tiny") == [2]
    checkpoint_files.verify(checkpoint_files.folder_of("tiny", 2))


def test_a_failure_of_the_last_save_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, {12})
    with pytest.raises(UserError, match="the last state of the run could not be saved"):
        train_tiny()
    assert not (files.run_dir("tiny") / "summary.json").exists()


def test_extend_lets_the_horizon_through_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    train_tiny()
    with pytest.raises(UserError, match=r"steps: 12 then, 20 now.*--extend"):
        train_tiny(resume="auto", num_iterations=20)
    with pytest.raises(UserError, match=r"--seed: 0 then, 1 now"):
        train_tiny(resume="auto", num_iterations=20, extend=True, seed=1)
    summary = train_tiny(resume="auto", num_iterations=20, extend=True)
    assert (summary["steps"], summary["status"]) == (20, "finished")
    assert "extended: steps: 12 then, 20 now" in capsys.readouterr().out


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["checkpoint", *words])
    try:
        checkpoint.main()
    except SystemExit as left:
        return int(left.code or 0)
    return 0


def test_the_command_lists_verifies_and_prunes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_tiny(save_every=2, keep_last=9)
    capsys.readouterr()
    assert command(monkeypatch, "list", "tiny") == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == [
        "2",
        "4",
        "6",
        "8",
        "10",
        "12",
    ]
    bad = checkpoint_files.folder_of("tiny", 10) / checkpoint_files.MODEL
    bad.write_bytes(bad.read_bytes()[:-1])
    assert command(monkeypatch, "verify", "tiny") == 2
    heard = capsys.readouterr()
    assert f"{bad}" in heard.out
    assert "1 of 6 checkpoints are damaged" in heard.err
    # The two newest that are whole, every fourth, and the damaged one, which is left for a person to look at.
    assert command(monkeypatch, "prune", "tiny", "--keep-every=4") == 0
    assert checkpoint_files.steps_of("tiny") == [4, 8, 10, 12]
    assert command(monkeypatch, "verify", "other") == 2
