"""SFT: it learns replies alone, from the base's weights and moments, and a kill costs it nothing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat.chat import sft
from nanochat.checkpoint import format as checkpoint_format
from nanochat.checkpoint import state as checkpoint_state
from nanochat.checkpoint.format import MODEL, OPTIMIZER
from nanochat.common import files
from nanochat.common.errors import UserError
from nanochat.common.machine import Precision
from nanochat.config.arguments import SftArgs
from nanochat.distributed.world import World
from nanochat.train import run as train_run
from tests.chat import corpora
from tests.dist.launch import lines
from tests.dist.world import run_ranks
from tests.reliability.figures import MakeFigure
from tests.reliability.warm import resume_through_kills
from tests.test_train import stop_after, weights
from tests.tiny import flags_of, tiny_corpus, train_tiny

STEPS = 8
ARGS = SftArgs(
    base="tiny",
    data=("talk",),
    run="sft",
    num_iterations=STEPS,
    device_batch_size=2,
    device_type="cpu",
    dtype="float32",
    eval_every=4,
    eval_tokens=512,
    save_every=2,
    keep_last=3,
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base directory with a trained base and a corpus of conversations."""
    folder = tmp_path_factory.mktemp("sft")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder / "base"))
        tiny_corpus(folder)
        train_tiny(num_iterations=6, save_every=0)
        rows = corpora.random_rows(300, 0, longest=6)
        corpora.write("talk", rows[:260], rows[260:])
    return folder / "base"


@pytest.fixture(autouse=True)
def base_dir(prepared: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A base directory of each test's own, whose corpora and base are shared."""
    base = tmp_path / "base"
    (base / "runs").mkdir(parents=True)
    for name in ("data", "tokenizers", "runs/tiny"):
        (base / name).symlink_to(prepared / name)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    return base


def finetune(world: World | None = None, **changes: Any) -> dict[str, Any]:
    """A run of SFT in this process; returns its summary."""
    world = world or World.single_process()
    plan, stage = sft.prepare(dataclasses.replace(ARGS, **changes), world)
    return train_run.run(plan, stage, Precision(torch.float32, "sdpa"), world)


def test_it_learns_and_is_a_run_like_any_other() -> None:
    summary = finetune(num_iterations=30, eval_every=10)
    assert (summary["status"], summary["steps"]) == ("finished", 30)
    entries = lines("sft", "")
    bpb = [line["val_bpb"] for line in entries if line["kind"] == "eval"]
    assert len(bpb) == 4
    assert bpb[-1] < bpb[0] - 0.2
    assert all(line["supervised_tokens"] > 0 for line in entries if line["kind"] == "step")
    plan = json.loads((files.run_dir("sft") / "config.json").read_text())
    assert (plan["finetune"]["stage"], plan["finetune"]["base"], plan["finetune"]["base_step"]) == (
        "sft",
        "tiny",
        6,
    )
    model, _, meta = checkpoint_state.load_model(
        "sft", device=torch.device("cpu"), precision=Precision(torch.float32, "sdpa")
    )
    assert meta["plan"]["finetune"]["settings"]["init_lr_frac"] == 0.8
    assert model.config.document_mask


def test_it_begins_with_the_weights_and_the_moments_of_the_base() -> None:
    plan, stage = sft.prepare(ARGS, World.single_process())
    precision, world = Precision(torch.float32, "sdpa"), World.single_process()
    state = train_run.create_state(plan, stage, precision, world)
    stage.begin(state, world)
    folder = checkpoint_format.folder_of("tiny", 6)
    then = checkpoint_format.read_tensors(folder / MODEL)
    assert all(torch.equal(p, then[name]) for name, p in state.model.named_parameters())
    moments = checkpoint_format.read_tensors(folder / OPTIMIZER)
    now = state.optimizer.state_tensors()
    assert all(torch.equal(now[name], moments[name]) for name in moments)
    assert (state.step, state.val_bpb) == (0, None)
    assert plan.schedule.matrix_weight_decay == 0
    assert all(group.weight_decay == 0 for group in plan.groups.values())


def test_the_horizon_is_an_epoch_and_rates_reach_zero() -> None:
    plan, stage = sft.prepare(dataclasses.replace(ARGS, num_iterations=None), World.single_process())
    assert plan.steps == -(-stage.loader.rows_per_epoch // plan.batch_rows)
    finetune(num_iterations=None, eval_every=0, run="epoch")
    steps = lines("epoch")
    assert steps[-1]["lr"] == pytest.approx(steps[0]["lr"] * 2 / plan.steps, rel=0.3)
    assert all(line["lr"] > 0 for line in steps)
    assert steps[-1]["epoch"] >= 1


@pytest.mark.parametrize("at", [1, 5])
def test_a_stopped_run_resumes_to_the_bit(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    finetune(run="whole")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(at, patch)
        assert finetune(run="parts")["status"] == "stopped"
    finetune(run="parts", resume="auto")
    assert lines("parts") == lines("whole")
    assert weights("parts", STEPS) == weights("whole", STEPS)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"init_lr_frac": 0.5}, "lr"),
        ({"data": ("other",)}, "data"),
        ({"document_mask": False}, "document_mask"),
        ({"seed": 3}, "--seed"),
        ({"base": "tiny2"}, "base"),
    ],
)
def test_another_run_is_refused(changes: dict[str, Any], named: str, base_dir: Path, prepared: Path) -> None:
    (base_dir / "runs/tiny2").symlink_to(prepared / "runs/tiny")
    finetune(num_iterations=4)
    if "data" in changes:
        corpora_rows = corpora.random_rows(40, 1)
        (base_dir / "data").unlink()
        (base_dir / "data").mkdir()
        for name in ("talk", "local"):
            (base_dir / "data" / name).symlink_to(prepared / "data" / name)
        corpora.write("other", corpora_rows, corpora_rows[:9])
    with pytest.raises(UserError, match=f"cannot be resumed.*{named}"):
        finetune(num_iterations=4, resume="auto", **changes)


def finetune_rank(world: World, changes: dict[str, Any]) -> None:
    finetune(world, **changes)


@pytest.mark.slow
def test_the_loss_depends_on_neither_ranks_nor_micro_batches(tmp_path: Path) -> None:
    """Micro-batches of 1 to 8 rows, and 1, 2 and 4 ranks: the same losses to 1e-6, the same gradients."""
    flags = {"num_iterations": 3, "eval_every": 0}
    finetune(run="one", device_batch_size=8, **flags)
    for rows in (1, 2, 4):
        finetune(run=f"rows{rows}", device_batch_size=rows, **flags)
    for ranks in (2, 4):
        run_ranks(ranks, tmp_path, finetune_rank, {"run": f"ranks{ranks}", "device_batch_size": 1, **flags})
    wanted = [line["loss"] for line in lines("one")]
    norms = [line["grad_norm"] for line in lines("one")]
    for run in ("rows1", "rows2", "rows4", "ranks2", "ranks4"):
        assert [line["loss"] for line in lines(run)] == pytest.approx(wanted, abs=1e-6), run
        assert [line["grad_norm"] for line in lines(run)] == pytest.approx(norms, rel=1e-5), run


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"base": ""}, "--base is missing"),
        ({"base": "nobody"}, "unknown run 'nobody'"),
        ({"base_step": 5}, "no checkpoint of step 5"),
        ({"data": ("local",)}, "conversations"),
        ({"data": ("absent",)}, "absent"),
    ],
)
def test_what_cannot_be_finetuned_is_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        finetune(**changes)


@pytest.mark.slow
def test_kills_at_random_moments_cost_nothing(tmp_path: Path, figure: MakeFigure) -> None:
    """Twenty kills with SIGKILL, wherever they fall, and then the end: the same bits."""
    steps = 60
    finetune(run="whole", num_iterations=steps, save_every=0, eval_every=20)
    tried = figure("P4", "kill -9 of chat_sft at a random moment, resumed to the end")
    asked = dataclasses.replace(ARGS, run="parts", num_iterations=steps, eval_every=20, resume="auto")
    resume_through_kills(flags_of(asked), tmp_path, "chat_sft", tried)
    assert weights("parts", steps) == weights("whole", steps)
    assert lines("parts") == lines("whole")
