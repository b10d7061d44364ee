"""The trainer on CUDA: a step waits for nothing, compiled it learns the same, a small model gets its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.utils

from nanochat.checkpoint.state import TrainState
from nanochat.common import files
from nanochat.common.machine import Precision
from nanochat.config import plan as planning
from nanochat.config.plan import Plan
from nanochat.data.corpus import Corpus
from nanochat.distributed.world import World
from nanochat.tokenizer.tokenizer import Tokenizer
from nanochat.train import memory
from nanochat.train import run as train_run
from nanochat.train.stage import Pretraining
from tests.tiny import tiny_args, tiny_corpus

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


def prepare(tmp_path: Path, **changes: Any) -> tuple[Plan, TrainState, World]:
    tiny_corpus(tmp_path)
    tokenizer, world = Tokenizer.load(files.tokenizer_dir("local")), World.single_process("cuda")
    plan = planning.plan(tiny_args(**changes), tokenizer.vocab_size)
    precision = Precision(torch.bfloat16, "sdpa")
    return (
        plan,
        train_run.create_state(plan, Pretraining(Corpus.open("local"), tokenizer), precision, world),
        world,
    )


def test_a_step_waits_for_nothing(tmp_path: Path) -> None:
    plan, state, world = prepare(tmp_path)
    for _ in range(2):
        train_run.train_step(plan, state, world)
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = train_run.train_step(plan, state, world)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert result.update.applied.item()
    state.loader.close()


def test_a_compiled_step_has_the_loss_of_a_plain_one(tmp_path: Path) -> None:
    losses = []
    for compiled in (False, True):
        plan, state, world = prepare(tmp_path)
        if compiled:
            state.model.compile_for(plan.device_batch_size)
            state.optimizer.compile_updates()
        losses.append([train_run.train_step(plan, state, world).loss.item() for _ in range(3)])
        state.loader.close()
    assert losses[0] == pytest.approx(losses[1], abs=0.02)


def test_steps_after_the_first_compile_nothing(tmp_path: Path) -> None:
    plan, state, world = prepare(tmp_path)
    torch._dynamo.utils.counters.clear()
    state.model.compile_for(plan.device_batch_size)
    state.optimizer.compile_updates()
    train_run.train_step(plan, state, world)
    counted = {name: dict(values) for name, values in torch._dynamo.utils.counters.items()}
    for _ in range(3):
        state.step += 1
        train_run.train_step(plan, state, world)
    assert torch._dynamo.utils.counters == counted
    assert not counted.get("graph_break")
    state.loader.close()


def test_a_small_model_gets_the_rows_of_the_plan(tmp_path: Path) -> None:
    shape = {"max_seq_len": 256, "aspect_ratio": 64, "total_batch_size": 32 * 256, "device_batch_size": None}
    plan, state, world = prepare(tmp_path, **shape)
    assert memory.rows_that_fit(plan, state, world, torch.bfloat16) == plan.device_batch_size
    state.loader.close()
