"""The recipe of the race to 3.28: batches and windows grow alike on any ranks; a target ends the run."""

from __future__ import annotations

import dataclasses
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat.checkpoint import format as checkpoint_format
from nanochat.checkpoint import state as checkpoint_state
from nanochat.common import files
from nanochat.common.errors import UserError
from nanochat.common.machine import Precision
from nanochat.config import plan as planning
from nanochat.config.arguments import TrainArgs
from nanochat.config.recipes import RECIPES, Recipe
from nanochat.distributed.world import World
from nanochat.model.gpt import GPT
from nanochat.train import hooks, step_metrics
from nanochat.train import run as train_run
from tests.dist.launch import digest, lines, losses
from tests.dist.world import run_ranks, train_rank
from tests.test_train import stop_after
from tests.tiny import tiny_args, tiny_corpus, train_tiny

# 24 rows in a batch at the end, in units of 8; windows that the tiny context has room for.
RACE: dict[str, Any] = {"recipe": "speedrun-124m", "total_batch_size": 768, "device_batch_size": 2}


def small_windows() -> Recipe:
    """The recipe with windows for which a tiny context has room."""
    return dataclasses.replace(RECIPES["speedrun-124m"], window_multiple=4)


@pytest.fixture(autouse=True)
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECIPES, "speedrun-124m", small_windows())
    tiny_corpus(tmp_path)


def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, tuple[int, ...], torch.Tensor]]:
    """Rows, windows and inputs of every step of this process."""
    seen: list[tuple[int, tuple[int, ...], torch.Tensor]] = []
    real_step = train_run.train_step

    def step(plan: Any, state: Any, world: Any) -> Any:
        rows: list[torch.Tensor] = []
        hook = state.model.embed.register_forward_pre_hook(lambda _, args: rows.append(args[0].clone()))
        result = real_step(plan, state, world)
        hook.remove()
        ids = torch.cat(rows)
        seen.append((len(ids), state.model.windows, ids))
        return result

    monkeypatch.setattr(train_run, "train_step", step)
    return seen


def test_batch_and_windows_grow_in_thirds(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watched(monkeypatch)
    summary = train_tiny(run="race", **RACE)
    assert [rows for rows, _, _ in seen] == [8] * 4 + [16] * 4 + [24] * 4
    # Depth 2: one layer of a quarter of the context, the last of all of it.
    assert [windows for _, windows, _ in seen] == [(4, 8)] * 4 + [(4, 16)] * 4 + [(8, 32)] * 4
    assert summary["tokens"] == 32 * 8 * (4 + 8 + 12)
    assert [entry["tokens"] // 256 for entry in lines("race")] == [1, 2, 3, 4, 6, 8, 10, 12, 15, 18, 21, 24]
    assert [entry["tokens"] // 256 for entry in lines("race", "eval")] == [0, 6, 18, 24]


def test_the_rows_are_those_of_a_run_whose_batch_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watched(monkeypatch)
    train_tiny(run="race", **RACE)
    race = torch.cat([ids for *_, ids in seen])
    seen.clear()
    train_tiny(run="plain", total_batch_size=256, device_batch_size=2, num_iterations=24)
    assert torch.equal(torch.cat([ids for *_, ids in seen]), race)


@pytest.mark.parametrize("at", [4, 6])
def test_a_resumed_run_is_the_same_run_to_the_bit(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    train_tiny(run="whole", eval_every=4, **RACE)
    with monkeypatch.context() as patch:
        stop_after(at, patch)
        assert train_tiny(run="parts", eval_every=4, **RACE)["status"] == "stopped"
    train_tiny(run="parts", eval_every=4, resume="auto", **RACE)
    assert lines("parts", "") == lines("whole", "")
    assert digest("parts", 12) == digest("whole", 12)


def race_rank(world: World, changes: dict[str, Any], stop_at: int | None) -> None:
    """`train_rank` with the windows of `corpus`, which other processes do not have of it."""
    RECIPES["speedrun-124m"] = small_windows()
    train_rank(world, changes, stop_at)


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.parametrize(
    "sizes", [(1, 2), *(pytest.param(s, marks=pytest.mark.slow) for s in ((2, 4), (4, 1)))]
)
def test_the_run_goes_on_with_other_ranks(sizes: tuple[int, int], tmp_path: Path) -> None:
    common = {**RACE, "device_batch_size": 1}
    train_tiny(run="whole", **common)
    run_ranks(sizes[0], tmp_path, race_rank, {"run": "parts", **common}, 6)
    run_ranks(sizes[1], tmp_path, race_rank, {"run": "parts", "resume": "auto", **common}, None)
    assert losses("parts") == pytest.approx(losses("whole"), abs=1e-5)
    ends = [checkpoint_format.read_state(checkpoint_format.folder_of(run, 12)) for run in ("whole", "parts")]
    assert ends[0]["loader"] == ends[1]["loader"]


def test_documents_are_masked_without_asking() -> None:
    train_tiny(run="race", num_iterations=2, **RACE)
    model, tokenizer, _ = checkpoint_state.load_model(
        "race", device=torch.device("cpu"), precision=Precision(torch.float32, "sdpa")
    )
    assert isinstance(model, GPT)
    assert model.document_bos == tokenizer.bos_id
    assert model.windows == (8, 32)
    assert planning.plan(TrainArgs(document_mask=True), 512).model.document_mask
    assert not planning.plan(TrainArgs(), 512).model.document_mask


# -----------------------------------------------------------------------------
# The target

# Batches this small scale the rates of the recipe down to a fortieth: undo it.
LEARNS: dict[str, Any] = {"matrix_lr": 0.9, "embedding_lr": 6.0, "unembedding_lr": 0.16, "warmup_steps": 5}
LONG: dict[str, Any] = {"num_iterations": 60, "eval_every": 10, "save_every": 0, **LEARNS}


def test_a_run_ends_at_the_first_validation_at_or_below_its_target() -> None:
    train_tiny(run="whole", **LONG)
    found = {entry["step"]: entry["val_loss"] for entry in lines("whole", "eval")}
    assert found[0] > found[20] > found[30]
    summary = train_tiny(run="raced", target_loss=found[30], **LONG)
    assert (summary["status"], summary["steps"]) == ("target_reached", 30)
    assert summary["val_loss"] == found[30] == summary["target_loss"]
    assert summary["tokens"] == 30 * 256
    assert summary == files.read_json(files.run_dir("raced") / "summary.json")
    assert losses("raced") == losses("whole")[:30]
    assert checkpoint_format.steps_of("raced") == [30]
    # The same command again changes nothing; without a target the run goes on to its end.
    assert train_tiny(run="raced", target_loss=found[30], resume="auto", **LONG) == summary
    assert train_tiny(run="raced", resume="auto", **LONG)["status"] == "finished"
    assert losses("raced") == losses("whole")


def test_a_target_that_is_not_reached_changes_nothing() -> None:
    train_tiny(run="whole")
    summary = train_tiny(run="raced", target_loss=1e-6)
    assert (summary["status"], summary["steps"]) == ("finished", 12)
    assert digest("raced", 12) == digest("whole", 12)
    with pytest.raises(UserError, match="--target-loss=0"):
        planning.plan(tiny_args(target_loss=0.0), 300)


def test_time_of_validation_is_not_time_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, validate = [0.0], hooks.evaluate
    monkeypatch.setattr(step_metrics, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    real_step = train_run.train_step

    def step(*args: Any) -> Any:
        clock[0] += 1.0
        return real_step(*args)

    def slow(*args: Any) -> Any:
        clock[0] += 100.0
        return validate(*args)

    monkeypatch.setattr(train_run, "train_step", step)
    monkeypatch.setattr(hooks, "evaluate", slow)
    summary = train_tiny(eval_every=2, sample_every=3)
    assert clock[0] > 700
    assert summary["train_seconds"] == pytest.approx(12.0)


def test_an_old_checkpoint_without_a_validation_loss_goes_on() -> None:
    train_tiny(run="whole")
    train_tiny(run="parts")
    files.remove_dir(checkpoint_format.folder_of("parts", 12))
    folder = checkpoint_format.folder_of("parts", 8)
    state = checkpoint_format.read_state(folder)
    assert "val_loss" in state
    plan = dataclasses.asdict(planning.plan(tiny_args(), 300))
    assert plan["schedule"]["batch_stages"] == ()
    old = {name: value for name, value in state.items() if name != "val_loss"}
    for name in ("batch_stages", "window_stages"):
        del old["plan"]["schedule"][name]
    del old["plan"]["args"]["target_loss"]
    rewrite(folder, old)
    train_tiny(run="parts", resume="auto")
    assert lines("parts", "") == lines("whole", "")


def rewrite(folder: Path, state: dict[str, Any]) -> None:
    """Put another state.json into a checkpoint, with its hash."""
    files.write_json(folder / checkpoint_format.STATE, state)
    manifest = files.read_json(folder / "MANIFEST.json")
    entry = manifest["files"][checkpoint_format.STATE]
    path = folder / checkpoint_format.STATE
    entry |= {"bytes": path.stat().st_size, "sha256": files.sha256(path)}
    files.write_json(folder / "MANIFEST.json", manifest)
