"""P7: a loss or gradient that is not finite, on any rank, in any micro-batch, never reaches the weights."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nanochat.checkpoint.state import TrainState
from nanochat.common import files
from nanochat.common.errors import UserError
from nanochat.common.machine import Precision, Speed
from nanochat.config import plan as planning
from nanochat.config.plan import Plan
from nanochat.data.corpus import Corpus
from nanochat.distributed.world import World
from nanochat.optim import muon_adamw
from nanochat.tokenizer.tokenizer import Tokenizer
from nanochat.train import run as train_run
from nanochat.train.run_log import RunLog
from nanochat.train.stage import Pretraining
from nanochat.train.step_metrics import StepReporter
from tests.tiny import tiny_args, tiny_corpus

POISONED = "blocks.1.mlp.up.weight"
CASES = list(itertools.product((math.nan, math.inf, -math.inf), ("loss", "grad"), ("first", "last")))


def prepare(world: World) -> tuple[Plan, TrainState]:
    """A run after two good steps, so that every moment holds something."""
    tokenizer = Tokenizer.load(files.tokenizer_dir("local"))
    plan = planning.plan(tiny_args(), tokenizer.vocab_size, world.size)
    corpus = Corpus.open("local")
    state = train_run.create_state(
        plan, Pretraining(corpus, tokenizer), Precision(torch.float32, "sdpa"), world
    )
    for _ in range(2):
        assert train_run.train_step(plan, state, world).update.applied
        state.step += 1
    return plan, state


def digest(state: TrainState) -> str:
    """Of every bit of the parameters and moments."""
    whole = hashlib.sha256()
    weights = {name: p.detach() for name, p in state.model.named_parameters()}
    for name, tensor in sorted({**weights, **state.optimizer.state_tensors()}.items()):
        whole.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return whole.hexdigest()


def poisoned_step(plan: Plan, state: TrainState, world: World, case: Any, bad_rank: int) -> Any:
    """One step whose loss or gradient is not finite in one micro-batch of one rank."""
    value, where, micro = case
    at = 0 if micro == "first" else plan.grad_accum_steps - 1
    calls = itertools.count()
    real_loss = state.model.loss

    def loss(*arguments: Any) -> torch.Tensor:
        found = real_loss(*arguments)
        if next(calls) == at and world.rank == bad_rank:
            if where == "loss":
                return found + value  # its gradient is as it was
            weight = dict(state.model.named_parameters())[POISONED]
            # Through the graph: the gradient of one element is the value, the loss is as it was.
            return found + NotFinite.apply(weight, value)
        return found

    state.model.loss = loss  # type: ignore[method-assign]
    try:
        return train_run.train_step(plan, state, world)
    finally:
        del state.model.loss


class NotFinite(torch.autograd.Function):
    """Zero, with a gradient of `value` at one element."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, value: float) -> torch.Tensor:
        ctx.shape, ctx.value = weight.shape, value
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        out = grad.new_zeros(ctx.shape)
        out[0, 0] = ctx.value
        return out, None


def outcomes(world: World, folder: Path) -> Iterator[dict[str, Any]]:
    """What every case did on this rank."""
    plan, state = prepare(world)
    with closing(RunLog(folder, enabled=False)) as log:
        for case, bad_rank in itertools.product(CASES, range(world.size)):
            before = digest(state)
            result = poisoned_step(plan, state, world, case, bad_rank)
            state.step += 1
            reporter = StepReporter(plan, world, log, Speed(1e12, "table", 1e12))
            message = ""
            try:
                reporter.add(state, result)
            except UserError as error:
                message = str(error)
            yield {
                "case": [str(part) for part in (*case, bad_rank)],
                "changed": digest(state) != before,
                "applied": bool(result.update.applied),
                "message": message,
            }
        assert train_run.train_step(plan, state, world).update.applied  # and a good step is taken again
    state.loader.close()


def rank_main(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    world = World(rank, size, torch.device("cpu"), "gloo")
    found = list(outcomes(world, Path(folder)))
    Path(f"{folder}/rank{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def check(number: int, outcome: dict[str, Any]) -> None:
    _, where, _, bad_rank = outcome["case"]
    assert not outcome["changed"], outcome
    assert not outcome["applied"], outcome
    place = f"loss of rank {bad_rank}" if where == "loss" else f"first in the gradient of {POISONED}"
    assert place in outcome["message"], outcome
    assert outcome["message"].startswith(f"step {2 + number}: "), outcome


def test_one_rank(tmp_path: Path, figure: Any) -> None:
    tiny_corpus(tmp_path)
    found = figure("P7", "steps not finite, 1 rank: no bit of weights or moments changes")
    for number, outcome in enumerate(outcomes(World.single_process(), tmp_path)):
        with found.trial(outcome["case"]):
            check(number, outcome)


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_two_ranks_agree(tmp_path: Path, figure: Any) -> None:
    tiny_corpus(tmp_path)
    mp.start_processes(rank_main, (2, str(tmp_path)), nprocs=2, start_method="fork")
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0] == ranks[1]
    found = figure("P7", "steps not finite, 2 ranks: no bit of weights or moments changes")
    for number, outcome in enumerate(ranks[0]):
        with found.trial(outcome["case"]):
            check(number, outcome)


def test_without_the_mask_the_weights_would_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted fault: the update runs whatever was found."""
    tiny_corpus(tmp_path)
    real = muon_adamw.StepRates
    monkeypatch.setattr(muon_adamw, "StepRates", lambda *numbers: real(*numbers[:-1], torch.tensor(True)))
    with pytest.raises(AssertionError):
        for number, outcome in enumerate(itertools.islice(outcomes(World.single_process(), tmp_path), 6)):
            check(number, outcome)
