"""Gradients that are reduced while the last backward pass runs, and given up where memory runs out in it."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.checkpoint.state import TrainState
from nanochat.common.files import tokenizer_dir
from nanochat.common.machine import Precision
from nanochat.config import plan as planning
from nanochat.data.corpus import Corpus
from nanochat.data.train_loader import Batch
from nanochat.distributed.weight_check import require_equal
from nanochat.distributed.world import World
from nanochat.tokenizer.tokenizer import Tokenizer
from nanochat.train import memory
from nanochat.train import run as train_run
from nanochat.train.stage import Pretraining
from tests.dist.world import run_ranks
from tests.tiny import tiny_args, tiny_corpus

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks: 0.3 s a world, 5 s if spawned")
STEPS, FAILING = 3, 1
ROWS = 2  # of a micro-batch, of which a rank has two a step


def state_of(world: World) -> TrainState:
    """The tiny run at its start."""
    tokenizer = Tokenizer.load(tokenizer_dir("local"))
    plan = planning.plan(tiny_args(device_batch_size=ROWS), tokenizer.vocab_size, world.size)
    precision = Precision(torch.float32, "sdpa")
    return train_run.create_state(plan, Pretraining(Corpus.open("local"), tokenizer), precision, world)


def record_begun() -> list[int]:
    """From here on, the number of elements of everything that this rank begins to reduce."""
    found: list[int] = []

    def recorded(function: Any, at: int) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            if options.get("async_op"):
                found.append(args[at].numel())
            return function(*args, **options)

        return call

    dist.reduce_scatter_tensor = recorded(dist.reduce_scatter_tensor, 1)
    dist.all_reduce = recorded(dist.all_reduce, 0)
    return found


def check_order(world: World) -> None:
    """The head is under way before the first layer's gradients are there; tables come last."""
    state, begun, seen = state_of(world), record_begun(), []
    with contextlib.closing(state.loader):
        ((ids, targets), _) = state.loader.next_batch()
    first = state.model.blocks[0].mlp.down.weight
    hook = first.register_hook(lambda grad: seen.append(len(begun)))
    loss = state.model.loss(ids, targets)
    with state.optimizer.reductions.early() if world.rank == 0 else contextlib.nullcontext():
        loss.backward()
    if world.rank == 0:
        sizes = {name: p.numel() for name, p in state.model.named_parameters()}
        assert begun[0] == sizes["head.weight"]
        assert begun[-1] == sizes["embed.weight"]
        assert 1 <= seen[0] < len(begun) == len(state.optimizer.shards)
    else:  # its turn comes when both catch up
        assert not begun
    hook.remove()
    state.optimizer.reductions.catch_up()
    assert state.optimizer.step(1.0, 0.9, 0.1, index=1).applied
    assert len(begun) == len(state.optimizer.shards)
    assert not any(hasattr(p, "grad_ready") for p in state.model.parameters())


def test_shards_are_reduced_in_one_order_as_their_gradients_are_whole(tmp_path: Path) -> None:
    tiny_corpus(tmp_path)
    run_ranks(2, tmp_path, check_order)


def starve(grad: Tensor) -> None:
    raise MemoryError


def train(world: World, early: bool, halved: bool, at: int | None = None) -> dict[str, Tensor]:
    """The parameters after a few steps.

    Args:
        world: the ranks.
        early: whether reductions begin in the last backward pass.
        halved: whether rows are halved at step FAILING.
        at: the micro-batch of that step in whose backward pass memory runs out on the last rank, if any.
    """
    state = state_of(world)
    optimizer, weight = state.optimizer, state.model.blocks[0].mlp.down.weight
    attempts: list[int] = []

    def passes(micro_batches: list[Batch]) -> Tensor:
        attempts.append(len(micro_batches))
        total = torch.zeros(())
        starved = len(attempts) == FAILING + 1 and world.rank == world.size - 1
        for i, (ids, targets) in enumerate(micro_batches):
            loss = state.model.loss(ids, targets) / len(micro_batches)
            hook = weight.register_hook(starve) if starved and i == at else None
            is_last = early and i == len(micro_batches) - 1
            try:
                with optimizer.reductions.early() if is_last else contextlib.nullcontext():
                    loss.backward()
            finally:
                if hook is not None:
                    hook.remove()
            total += loss.detach()
        return total

    with contextlib.closing(state.loader):
        for step in range(STEPS):
            if halved and step == FAILING:
                state.loader.device_batch_size = ROWS // 2
            memory.halve_until_it_fits(passes, state.loader.next_batch(), state, world)
            assert optimizer.step(1.0, 0.9, 0.1, index=step).applied
    assert attempts == ([2, 2, 4, 4] if at is not None else [2, 4, 4] if halved else [2, 2, 2])
    require_equal(dict(state.model.named_parameters()), world, STEPS)
    return {name: p.detach() for name, p in state.model.named_parameters()}


def check_bits(world: World) -> None:
    """Early or late, and given up before any rank has begun to reduce or after, the weights are the same."""
    late, halved = train(world, False, False), train(world, False, True)
    early, failed_first, failed_last = (
        train(world, True, False),
        train(world, True, False, 0),
        train(world, True, False, 1),
    )
    for name, p in late.items():
        assert torch.equal(early[name], p)
        assert torch.equal(failed_first[name], halved[name])
        assert torch.equal(failed_last[name], halved[name])
    assert any(not torch.equal(halved[name], p) for name, p in late.items())


def test_early_reductions_and_those_given_up_change_no_bit(tmp_path: Path) -> None:
    tiny_corpus(tmp_path)
    run_ranks(2, tmp_path, check_bits)
