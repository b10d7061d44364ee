"""The plans of karpathy/nanochat's base_train for 21 argument lists, read off by running it, equal ours."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nanochat.config import arguments, schedule
from nanochat.config import plan as planning
from nanochat.config.arguments import TrainArgs
from nanochat.config.plan import Plan
from tests.conftest import SHARED_DATA

PATH = SHARED_DATA / "parity" / "plans.json"
PLANS: list[dict[str, Any]] = json.loads(PATH.read_text("utf-8")) if PATH.exists() else []
pytestmark = pytest.mark.skipif(not PLANS, reason="the peer's plans are not beside this checkout")

SMEAR_FLOPS = 6 * 24  # the peer counts the smear gate's 24 weights among the matrices

# Ours warms up in a tenth of a run at most, and takes fewer rows from depth 20 on (dev/LOG.md).
PEER_DEFAULTS = ("--warmup-steps=40", "--device-batch-size=32")


@pytest.fixture(params=PLANS, ids=lambda want: "".join(want["argv"]) + f"-{want['vocab']}")
def pair(request: pytest.FixtureRequest) -> tuple[dict[str, Any], Plan]:
    """What the peer derives, and what we do."""
    want: dict[str, Any] = request.param
    args = arguments.parse(TrainArgs, [*PEER_DEFAULTS, *want["argv"]])
    return want, planning.plan(args, want["vocab"])


def test_there_are_all_of_them() -> None:
    assert len(PLANS) == 21


def test_shape_and_parameters(pair: tuple[dict[str, Any], Plan]) -> None:
    want, plan = pair
    counts, params, model = want["counts"], plan.params, plan.model
    assert (model.n_embd, model.n_head) == (want["dim"], want["heads"])
    assert list(model.windows) == want["windows"]
    assert (params.embedding, params.unembedding) == (counts["wte"], counts["lm_head"])
    assert (params.value_embedding, params.matrix) == (counts["value_embeds"], counts["transformer_matrices"])
    assert (params.scalars, params.total) == (counts["scalars"], counts["total"])
    assert params.scaling == want["scaling"]
    assert plan.flops_per_token + SMEAR_FLOPS == want["flops"]


def test_batch_and_horizon(pair: tuple[dict[str, Any], Plan]) -> None:
    want, plan = pair
    assert (plan.batch_tokens, plan.steps) == (want["batch"], want["iters"])
    assert plan.grad_accum_steps == want["accum"]


def test_groups(pair: tuple[dict[str, Any], Plan]) -> None:
    want, plan = pair
    adam = [group for group in want["groups"] if group["kind"] == "adamw"]
    kinds = ("unembedding", "embedding", "value_embedding", "resid", "x0", "smear")
    for kind, theirs in zip(kinds, adam, strict=True):
        ours = plan.groups[kind]
        assert ours.lr == pytest.approx(theirs["lr"], rel=1e-12), kind
        assert [ours.beta1, ours.beta2, ours.eps, ours.weight_decay] == [
            *theirs["betas"],
            theirs["eps"],
            theirs["wd"],
        ]
    matrices = [group for group in want["groups"] if group["kind"] == "muon"]
    for theirs in matrices:
        ours = plan.groups["matrix"]
        assert ours.lr == pytest.approx(theirs["lr"], rel=1e-12)
        assert ours.beta2 == theirs["beta2"]
        assert ours.weight_decay == pytest.approx(theirs["wd"], rel=1e-12)


def test_schedule_at_every_step_that_was_read_off(pair: tuple[dict[str, Any], Plan]) -> None:
    want, plan = pair
    for step, theirs in want["schedule"].items():
        ours = [
            rule(int(step), plan.schedule)
            for rule in (schedule.lr_multiplier, schedule.muon_momentum, schedule.muon_weight_decay)
        ]
        assert ours == pytest.approx(theirs, rel=1e-9), step


def test_the_flags_of_embeddings_and_scalars_move_the_groups_that_the_peer_moves() -> None:
    """`--embedding-lr` also the value tables, by half; `--scalar-lr` x0 whole, resid by a hundredth."""
    base, moved = (
        planning.plan(TrainArgs(**flags), 32768) for flags in ({}, {"embedding_lr": 0.6, "scalar_lr": 1})
    )
    factors = {kind: moved.groups[kind].lr / base.groups[kind].lr for kind in base.groups}
    assert factors == pytest.approx(
        {"embedding": 2, "value_embedding": 2, "x0": 2, "resid": 2, "matrix": 1, "unembedding": 1, "smear": 1}
    )
    assert moved.groups["resid"].lr == pytest.approx(0.01 * moved.groups["x0"].lr)
    assert moved.groups["value_embedding"].lr == pytest.approx(0.5 * moved.groups["embedding"].lr)


def test_a_warmup_that_is_asked_for_is_taken_whole() -> None:
    assert planning.plan(TrainArgs(num_iterations=50), 32768).schedule.warmup_steps == 5
    assert planning.plan(TrainArgs(num_iterations=50, warmup_steps=30), 32768).schedule.warmup_steps == 30
