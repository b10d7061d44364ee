"""Saving beside training: retention, cadence by the clock, failures that are told of and survived."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanochat.checkpoint import async_saver
from nanochat.checkpoint import format as checkpoint_format
from nanochat.checkpoint import state as checkpoint_state
from nanochat.common import files
from nanochat.common.errors import UserError
from nanochat.train import hooks
from nanochat.train import run as train_run
from scripts import checkpoint as checkpoint_command
from tests.tiny import read_metrics, tiny_corpus, train_tiny


@pytest.fixture(autouse=True)
def corpus(tmp_path: Path) -> None:
    tiny_corpus(tmp_path)


def test_retention_keeps_the_last_and_every_nth() -> None:
    train_tiny(save_every=2, keep_last=1, keep_every=6, num_iterations=16, eval_every=0)
    assert checkpoint_format.steps_of("tiny") == [6, 12, 16]


def test_a_save_does_not_hold_training_up_and_holds_the_state_of_its_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The write of step 4 is held until step 7 has been done; what it then writes is step 4's."""
    train_tiny(run="plain", keep_last=9)
    go_on, real_write, real_step = threading.Event(), checkpoint_format.Snapshot.write, train_run.train_step

    def held(snapshot: checkpoint_format.Snapshot) -> float:
        assert go_on.wait(60)
        return real_write(snapshot)

    def step(plan: Any, state: Any, world: Any) -> Any:
        result = real_step(plan, state, world)
        if state.step == 6:
            go_on.set()
        return result

    monkeypatch.setattr(checkpoint_format.Snapshot, "write", held)
    monkeypatch.setattr(train_run, "train_step", step)
    train_tiny(run="held", keep_last=9)
    for at in (4, 8, 12):
        for name in (checkpoint_format.MODEL, checkpoint_format.OPTIMIZER):
            plain, held_file = (checkpoint_format.folder_of(run, at) / name for run in ("plain", "held"))
            assert plain.read_bytes() == held_file.read_bytes()


def test_a_snapshot_shares_no_memory_with_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def look(state: checkpoint_state.TrainState, *rest: Any) -> Any:
        snapshot = real(state, *rest)
        assert snapshot is not None
        with torch.no_grad():
            for name, parameter in state.model.named_parameters():
                assert snapshot.model[name].data_ptr() != parameter.data_ptr()
        moments = state.optimizer.state_tensors()
        assert all(snapshot.optimizer[name].data_ptr() != t.data_ptr() for name, t in moments.items())
        seen.append(state.step)
        return snapshot

    real = checkpoint_state.snapshot
    monkeypatch.setattr(checkpoint_state, "snapshot", look)
    train_tiny()
    assert seen == [4, 8, 12]


def test_minutes_save_too(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(async_saver, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    real_step = train_run.train_step

    def slow(*args: Any) -> Any:
        clock[0] += 61.0
        return real_step(*args)

    monkeypatch.setattr(train_run, "train_step", slow)
    train_tiny(save_every=0, save_minutes=5, keep_last=9, num_iterations=12)
    assert checkpoint_format.steps_of("tiny") == [5, 10, 12]


def failing(monkeypatch: pytest.MonkeyPatch, bad_steps: set[int]) -> None:
    """Where a checkpoint of these steps should go, there is a file in the way of its temporary folder."""
    real_write = checkpoint_format.Snapshot.write

    def write(snapshot: checkpoint_format.Snapshot) -> float:
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

    monkeypatch.setattr(checkpoint_format.Snapshot, "write", write)


def test_a_save_that_fails_costs_only_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, {4, 6})
    train_tiny(save_every=2, keep_last=9)
    assert checkpoint_format.steps_of("tiny") == [2, 8, 10, 12]
    told = capsys.readouterr().out
    assert "warning: step_000004 was not saved" in told
    assert "warning: step_000006 was not saved" in told


def test_three_failures_in_a_row_stop_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, {4, 6, 8})
    with pytest.raises(UserError, match="3 saves in a row have failed"):
        train_tiny(save_every=2, keep_last=9)
    assert checkpoint_format.steps_of("tiny") == [2]
    checkpoint_format.verify(checkpoint_format.folder_of("tiny", 2))


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
        checkpoint_command.main()
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
    bad = checkpoint_format.folder_of("tiny", 10) / checkpoint_format.MODEL
    bad.write_bytes(bad.read_bytes()[:-1])
    assert command(monkeypatch, "verify", "tiny") == 2
    heard = capsys.readouterr()
    assert f"{bad}" in heard.out
    assert "1 of 6 checkpoints are damaged" in heard.err
    # The two newest that are whole, every fourth, and the damaged one, which is left for a person to look at.
    assert command(monkeypatch, "prune", "tiny", "--keep-every=4") == 0
    assert checkpoint_format.steps_of("tiny") == [4, 8, 10, 12]
    assert command(monkeypatch, "verify", "other") == 2


# ----------------------------------------------------------------------------------------------------
# branches: a run that goes on from an earlier step


def stopped_after(step: int, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> dict[str, Any]:
    """Train, asked to stop after a step as a signal asks."""
    real_step, done = train_run.train_step, [0]

    def counted(plan: Any, state: Any, world: Any) -> Any:
        done[0] = state.step + 1
        return real_step(plan, state, world)

    with monkeypatch.context() as patch:
        patch.setattr(train_run, "train_step", counted)
        patch.setattr(train_run, "requested", lambda: done[0] >= step)
        return train_tiny(**changes)


def weights(step: int) -> bytes:
    return (checkpoint_format.folder_of("tiny", step) / checkpoint_format.MODEL).read_bytes()


def aside() -> list[str]:
    folder = files.checkpoints_dir("tiny") / checkpoint_format.ABANDONED
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def test_saves_of_a_run_that_goes_on_from_an_earlier_step_are_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_tiny(keep_last=3)
    stopped_after(6, monkeypatch, resume="4", keep_last=2, save_every=1)
    assert checkpoint_format.steps_of("tiny") == [5, 6]
    assert aside() == ["step_000008", "step_000012"]
    told = capsys.readouterr().out
    assert "abandoned, for this run goes on from step 4: step_000008, step_000012" in told
    assert checkpoint_format.find("tiny", None) == checkpoint_format.folder_of("tiny", 6)


@pytest.mark.parametrize("saved", [False, True])
def test_auto_goes_on_on_the_new_branch_also_when_it_has_saved_nothing_yet(
    saved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_tiny(keep_last=3)
    save_every = 2 if saved else 0
    real_save = async_saver.Saver.save
    if not saved:  # as a kill -9 leaves it
        monkeypatch.setattr(async_saver.Saver, "save", lambda self, state: None)
    stopped_after(6, monkeypatch, resume="4", keep_last=2, save_every=save_every, seed=0)
    monkeypatch.setattr(async_saver.Saver, "save", real_save)
    summary = train_tiny(resume="auto", extend=True, num_iterations=16)
    steps = [e["step"] for e in read_metrics(files.run_dir("tiny") / "metrics.jsonl") if e["kind"] == "step"]
    assert summary["steps"] == 16
    assert steps == list(range(16))


def test_the_curve_of_an_abandoned_branch_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    train_tiny(keep_last=3)
    before = (files.run_dir("tiny") / "metrics.jsonl").read_bytes()
    stopped_after(6, monkeypatch, resume="4", keep_last=2)
    assert (files.run_dir("tiny") / "metrics.1.jsonl").read_bytes() == before
    train_tiny(resume="auto")  # the same branch: no copy of what is only done again
    assert not (files.run_dir("tiny") / "metrics.2.jsonl").exists()


def test_two_branches_left_at_one_step_are_both_there(monkeypatch: pytest.MonkeyPatch) -> None:
    train_tiny(keep_last=9)
    stopped_after(9, monkeypatch, resume="4", keep_last=9)
    stopped_after(6, monkeypatch, resume="4", keep_last=9)
    assert aside() == ["step_000008", "step_000008.2", "step_000009", "step_000012"]


def test_damaged_ones_that_were_passed_over_do_not_push_out_whole_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train_tiny(keep_last=9, save_every=2)
    for step in (10, 12):
        (checkpoint_format.folder_of("tiny", step) / checkpoint_format.STATE).write_bytes(b"{}")
    stopped_after(11, monkeypatch, resume="auto", keep_last=2, save_every=3)
    assert checkpoint_format.steps_of("tiny") == [9, 11]
    assert [checkpoint_format.verify(checkpoint_format.folder_of("tiny", step)) for step in (9, 11)]
    assert aside() == ["step_000010", "step_000012"]
    assert checkpoint_format.find("tiny", None) == checkpoint_format.folder_of("tiny", 11)


def test_one_that_is_damaged_while_training_goes_on_is_not_counted_as_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Step 6 loses its manifest before 8 is saved: 4 and 8 are the two that are kept."""
    real_step = train_run.train_step

    def step(plan: Any, state: Any, world: Any) -> Any:
        if state.step == 7:
            for thread in threading.enumerate():
                if thread.name == "saver":  # that writes step 6
                    thread.join()
            (checkpoint_format.folder_of("tiny", 6) / checkpoint_format.MANIFEST).unlink()
        return real_step(plan, state, world)

    monkeypatch.setattr(train_run, "train_step", step)
    stopped_after(8, monkeypatch, keep_last=2, save_every=2)
    assert checkpoint_format.steps_of("tiny") == [4, 6, 8]
    checkpoint_format.verify(checkpoint_format.folder_of("tiny", 4))


def test_a_refused_resume_leaves_everything_where_it_is() -> None:
    train_tiny(keep_last=3)
    with pytest.raises(UserError, match="--seed"):
        train_tiny(resume="4", seed=1)
    assert checkpoint_format.steps_of("tiny") == [4, 8, 12]
    assert aside() == []


def test_an_abandoned_one_can_be_gone_back_to_as_the_message_says(monkeypatch: pytest.MonkeyPatch) -> None:
    train_tiny(keep_last=3)
    end = weights(12)
    stopped_after(6, monkeypatch, resume="4", keep_last=2)
    with pytest.raises(UserError, match="no checkpoint of step 8.*step_000008 was set aside: move it back"):
        train_tiny(resume="8")
    folder = checkpoint_format.folder_of("tiny", 8)
    (folder.parent / checkpoint_format.ABANDONED / folder.name).rename(folder)
    train_tiny(resume="8")
    assert weights(12) == end


# ----------------------------------------------------------------------------------------------------
# deleting old ones is not saving


def test_old_ones_that_cannot_be_deleted_do_not_stop_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(files, "remove_dir", refuse)
    assert train_tiny(save_every=1, keep_last=2)["status"] == "finished"
    assert checkpoint_format.steps_of("tiny") == list(range(1, 13))
    told = capsys.readouterr().out
    assert "step_000001 could not be deleted (Input/output error); the next save tries again" in told
    assert "was not saved" not in told
    monkeypatch.undo()


def test_one_that_somebody_else_has_deleted_is_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = files.remove_dir

    def twice(path: Path) -> None:
        real(path)
        real(path)

    monkeypatch.setattr(files, "remove_dir", twice)
    train_tiny(save_every=2, keep_last=2)
    assert checkpoint_format.steps_of("tiny") == [10, 12]
    assert "warning" not in capsys.readouterr().out


def test_names_that_look_like_a_step_are_left_alone() -> None:
    """Zeros before, digits of other scripts: neither is a checkpoint, and none takes a real one's place."""
    train_tiny(keep_last=9)
    folder = files.checkpoints_dir("tiny")
    twins = ("step_0000012", "step_00001\u0662", "step_12", "step_000012.2", "step_000012 ")
    for twin in twins:
        shutil.copytree(folder / "step_000012", folder / twin)
    assert checkpoint_format.steps_of("tiny") == [4, 8, 12]
    assert checkpoint_format.prune("tiny", checkpoint_format.steps_of("tiny"), keep_last=1) == [4, 8]
    assert sorted(path.name for path in folder.iterdir()) == sorted(["step_000012", *twins])


# ----------------------------------------------------------------------------------------------------
# what is not finite


@pytest.mark.parametrize("what", ["weight", "moment"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_never_saved(what: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """One element turns after step 5, without a loss or gradient that shows it before the save of step 6."""
    real_step = train_run.train_step

    def step(plan: Any, state: Any, world: Any) -> Any:
        result = real_step(plan, state, world)
        if state.step == 5:
            with torch.no_grad():
                if what == "weight":
                    dict(state.model.named_parameters())["blocks.1.mlp.up.weight"][3, 2] = value
                else:
                    moments = state.optimizer.state_tensors()
                    moments["blocks.1.mlp.up.weight.momentum"][3, 2] = value
                    state.optimizer.load_state_tensors(moments)
        return result

    monkeypatch.setattr(train_run, "train_step", step)
    with pytest.raises(UserError, match=r"after step 6, blocks\.1\.mlp\.up\.weight.* is not finite"):
        train_tiny(save_every=2, keep_last=1)
    assert checkpoint_format.steps_of("tiny") == [4]
    checkpoint_format.verify(checkpoint_format.folder_of("tiny", 4))


def test_a_validation_that_is_not_finite_is_null_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    real = hooks.evaluate
    found = iter([2.0, float("nan"), float("inf"), float("nan")])
    monkeypatch.setattr(hooks, "evaluate", lambda *_: SimpleNamespace(bpb=(v := next(found)), loss=v))
    summary = train_tiny(eval_every=4)
    assert (summary["val_bpb"], summary["min_val_bpb"], summary["val_loss"]) == (None, 2.0, None)
    meta = checkpoint_format.read_state(checkpoint_format.folder_of("tiny", 12))
    assert (meta["min_val_bpb"], meta["step"]) == (2.0, 12)
    lines = read_metrics(files.run_dir("tiny") / "metrics.jsonl")
    assert [e["val_bpb"] for e in lines if e["kind"] == "eval"] == [2.0, None, None, None]
    monkeypatch.setattr(hooks, "evaluate", real)
    assert train_tiny(resume="auto", extend=True, num_iterations=14)["val_bpb"] is not None


def test_weights_that_an_update_broke_are_named_where_the_loss_shows_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real_step = train_run.train_step

    def step(plan: Any, state: Any, world: Any) -> Any:
        result = real_step(plan, state, world)
        if state.step == 5:
            with torch.no_grad():
                dict(state.model.named_parameters())["embed.weight"].fill_(float("nan"))
        return result

    monkeypatch.setattr(train_run, "train_step", step)
    with pytest.raises(UserError, match=r"step 6: loss nan.*embed\.weight is not finite since an update"):
        train_tiny()
