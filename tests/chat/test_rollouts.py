"""Rollouts: the gradient is REINFORCE's, whatever the packing, the micro-batches, the ranks and the stops."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanochat.chat import conversation, rollouts, tasks
from nanochat.chat.rollouts import Group, Question, Rollout, RolloutLoader
from nanochat.common.errors import UserError
from nanochat.common.machine import Precision
from nanochat.common.stop_signals import Stopped
from nanochat.config import plan as planning
from nanochat.config.arguments import RlArgs
from nanochat.data.train_loader import Batch
from nanochat.distributed.world import World
from nanochat.model.gpt import GPT
from nanochat.tokenizer.tokenizer import Tokenizer
from tests.tiny import tiny_args, tokenizer_named

PROMPTS = 4
ARGS = RlArgs(prompts=PROMPTS, samples=5, max_new_tokens=8, seed=3)
WORDS = ("the cat", "a mat near rain", "two dogs", "red house", "green hills")


class Ranks:
    """All ranks of a world in one process: threads that meet in each collective."""

    def __init__(self, size: int) -> None:
        self.size, self.meeting = size, threading.Barrier(size)
        self.brought: list[Any] = [None] * size
        ranks = self

        class Together(World):
            def gather_ints(self, values: list[int]) -> list[list[int]]:
                return ranks.meet(self.rank, values)

            def max_over_ranks(self, value: int) -> int:
                return max(ranks.meet(self.rank, value))

            def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
                return torch.stack(ranks.meet(self.rank, tensor.clone())).sum(0)

        self.worlds: list[World] = [Together(r, size, torch.device("cpu"), "threads") for r in range(size)]

    def meet(self, rank: int, value: Any) -> list[Any]:
        self.brought[rank] = value
        self.meeting.wait()
        everything = list(self.brought)
        self.meeting.wait()
        return everything

    def run(self, action: Callable[[World], Any]) -> list[Any]:
        """What the action gives on each rank."""
        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(action, self.worlds))


@pytest.fixture
def tokenizer() -> Tokenizer:
    return tokenizer_named("local")


def model_of(tokenizer: Tokenizer, seed: int = 0) -> GPT:
    """A model whose replies are random and short, call the tool, and break the rules now and then."""
    config = planning.plan(tiny_args(max_seq_len=48, total_batch_size=480), tokenizer.vocab_size).model
    model = GPT(config, Precision(torch.float32, "sdpa"), tokenizer.bos_id)
    model.isolates_documents = True
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
        ids = torch.randint(256, (8, 48), generator=generator)
        common = model(ids).mean((0, 1))
        ends = [
            tokenizer.special_id(f"<|{name}|>") for name in ("assistant_end", "python_start", "python_end")
        ]
        model.head.weight[ends] += common * (5 / common.square().sum())
    return model


# A shape is all that the rows of a batch depend on.
SHAPE = GPT(
    planning.plan(tiny_args(max_seq_len=48, total_batch_size=480), 300).model,
    Precision(torch.float32, "sdpa"),
)


def row_of(number: int) -> dict[str, Any]:
    words = " ".join(WORDS[(number + i) % len(WORDS)] for i in range(1 + number % 3))
    messages = [{"role": "user", "content": words}, {"role": "assistant", "content": "yes"}]
    return {"messages": messages, "id": str(number), "judge": "exact", "answer": "yes"}


def asking(tokenizer: Tokenizer) -> Callable[[int, int], list[Question]]:
    def ask(first: int, count: int) -> list[Question]:
        rows = [row_of(number) for number in range(first, first + count)]
        asked = [conversation.read(row, "test")[:-1] for row in rows]
        prompts = [conversation.prompt(tokenizer, one) for one in asked]
        return [Question(first + i, row, ids) for i, (row, ids) in enumerate(zip(rows, prompts, strict=True))]

    return ask


def loader_of(
    tokenizer: Tokenizer,
    model: GPT,
    world: World,
    reference: GPT | None = None,
    device_batch_size: int = 2,
    **changes: int,
) -> RolloutLoader:
    args = dataclasses.replace(ARGS, **changes)
    models = model, reference or model
    return RolloutLoader(*models, tokenizer, asking(tokenizer), args, world, device_batch_size)


def by_length(row: Any, reply: Any) -> bool:
    """A judge for models that know nothing: of the reply alone, and right about half the time."""
    return sum(len(part.text) for part in reply) % 2 == 0


@pytest.fixture(autouse=True)
def judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replies are right by their length, and need not have ended."""
    monkeypatch.setattr(tasks, "right", by_length)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Group]:
    """The groups that the first rank gets, as they are drawn."""
    seen: list[Group] = []
    real = RolloutLoader._groups

    def groups(self: RolloutLoader, questions: Sequence[Question]) -> list[Group]:
        found = real(self, questions)
        seen.extend(found if self._world.is_main else [])
        return found

    monkeypatch.setattr(RolloutLoader, "_groups", groups)
    return seen


def varies(group: Group) -> bool:
    return 0 < sum(rollout.reward for rollout in group) < len(group)


def kept(drawn: list[Group]) -> list[Group]:
    """Of the groups of a step, those that it consists of."""
    return [*filter(varies, drawn), *itertools.filterfalse(varies, drawn)][:PROMPTS]


# ------------------------------------------------------------------------------------------------
# the mathematics


def plain_gradient(model: GPT, groups: list[Group]) -> dict[str, torch.Tensor]:
    """Minus the sum of A log p over M, each rollout alone, by log_softmax of the logits."""
    model.zero_grad()
    count = sum(sum(r.sampled) for group in groups for r in group)
    for group in groups:
        mean = sum(r.reward for r in group) / len(group)
        for r in group:
            ids = torch.tensor(r.ids)
            logp = model.logits(ids[None, :-1])[0].log_softmax(-1)
            chosen = logp[torch.arange(len(ids) - 1), ids[1:]]
            mask = torch.tensor(r.sampled[1:], dtype=torch.float32)
            (-(r.reward - mean) * (chosen * mask).sum() / count).backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


def gradient(model: GPT, batches: list[Batch]) -> dict[str, torch.Tensor]:
    """As the trainer sums it on a rank."""
    model.zero_grad()
    for batch in batches:
        model.loss(batch.inputs, batch.targets, weights=batch.weights).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("ranks", "rows"), [(1, 1), (1, 3), (2, 2), (4, 1), (3, 1)])
def test_the_gradient_is_the_plain_formulas(
    tokenizer: Tokenizer, drawn: list[Group], ranks: int, rows: int
) -> None:
    models = [model_of(tokenizer) for _ in range(ranks)]

    def batches(world: World) -> list[Batch]:
        return loader_of(tokenizer, models[world.rank], world, device_batch_size=rows).next_batch()

    by_rank = Ranks(ranks).run(batches)
    assert all(batch.inputs.numel() <= rows * 48 for one in by_rank for batch in one)
    found = [gradient(model, one) for model, one in zip(models, by_rank, strict=True)]
    want = plain_gradient(models[0], kept(drawn))
    assert any(grad.abs().max() > 1e-4 for grad in want.values())
    for name, grad in want.items():
        mean = sum(one[name] for one in found) / ranks
        assert (mean - grad).abs().max() <= 1e-5 * max(1e-2, float(grad.abs().max())), name


def test_the_model_learns_only_from_what_it_drew(tokenizer: Tokenizer, drawn: list[Group]) -> None:
    batches = loader_of(tokenizer, model_of(tokenizer), World.single_process()).next_batch()
    inputs, targets, weights = (
        torch.cat([part.flatten() for part in parts]) for parts in zip(*batches, strict=True)
    )
    taught = [rollout for group in kept(drawn) if varies(group) for rollout in group]
    assert any(r.sampled[r.sampled.index(True) :].count(False) for r in taught)  # a tool was called
    ids = [token for r in taught for token, drew in zip(r.ids, r.sampled, strict=True) if drew]
    assert sorted(targets[targets >= 0].tolist()) == sorted(ids)
    assert (weights[targets < 0] == 0).all()
    assert (weights[targets >= 0] != 0).all()
    assert (targets[inputs == tokenizer.special_id("<|assistant_start|>")] >= 0).all()
    end = tokenizer.special_id("<|assistant_end|>")
    assert all(r.ids[-1] == end and r.sampled[-1] for r in taught if r.reason == "stop")
    assert (targets == end).sum() == sum(r.ids[-1] == end for r in taught)
    assert {r.reason for r in taught} == {"stop", "length", "forbidden"}
    assert not any(r.reward for r in taught if r.reason != "stop")


@given(
    lengths=st.lists(st.integers(2, 49), min_size=1, max_size=30),
    ranks=st.integers(1, 5),
    rows=st.integers(1, 4),
    right=st.integers(0, 2**30),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_reply_is_in_one_row_of_one_rank(
    tokenizer: Tokenizer, lengths: list[int], ranks: int, rows: int, right: int
) -> None:
    group = [
        Rollout([100 * i + j + 1 for j in range(length)], [j >= length // 2 for j in range(length)],
                right >> i & 1, "stop")
        for i, length in enumerate(lengths)
    ]  # fmt: skip
    found, total = [], 0.0
    for world in Ranks(ranks).worlds:
        for batch in loader_of(tokenizer, SHAPE, world, device_batch_size=rows)._batches([group], 7):
            assert batch.inputs.numel() <= rows * 48
            found += [row[row > 0].tolist() for row in batch.targets]
            total += float(batch.weights.sum()) / ranks
    drew = [[token for token, d in zip(r.ids, r.sampled, strict=True) if d] for r in group]
    assert sorted(filter(None, found)) == sorted(drew)
    mean = sum(r.reward for r in group) / len(group)
    want = sum((r.reward - mean) * sum(r.sampled) for r in group) / 7
    assert total == pytest.approx(want, abs=1e-4)


def test_advantages_are_centered() -> None:
    group = [Rollout([1], [True], reward, "stop") for reward in (1, 0, 0, 1, 1)]
    assert rollouts.advantages(group) == pytest.approx([0.4, -0.6, -0.6, 0.4, 0.4])


# ------------------------------------------------------------------------------------------------
# groups without variance


def judge_by_question(monkeypatch: pytest.MonkeyPatch, teaches: Callable[[int], bool]) -> None:
    """Rewards differ in the groups of some questions only."""

    def right(row: Any, reply: Any) -> bool:
        return teaches(int(row["id"])) and by_length(row, reply)

    monkeypatch.setattr(tasks, "right", right)


def test_groups_without_variance_are_replaced(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, drawn: list[Group]
) -> None:
    judge_by_question(monkeypatch, lambda number: number >= 3)
    loader = loader_of(tokenizer, model_of(tokenizer), World.single_process(), samples=32)
    batches = loader.next_batch()
    assert [varies(group) for group in drawn] == [False] * 3 + [True] * 4
    assert sum(len(batch.inputs) for batch in batches) == 4 * 32
    assert loader.state_dict()["asked"] == 7
    assert loader.metrics["frac_reward_zero_std"] == pytest.approx(3 / 7)


def test_at_most_twice_the_questions_are_asked(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, drawn: list[Group]
) -> None:
    """Groups that could not be replaced count in M, so that one group does not weigh as much as four."""
    judge_by_question(monkeypatch, lambda number: number == 1)
    loader = loader_of(tokenizer, model_of(tokenizer), World.single_process(), samples=16)
    batches = loader.next_batch()
    assert loader.state_dict()["asked"] == len(drawn) == 2 * PROMPTS
    assert sum(len(batch.inputs) for batch in batches) == 16
    tokens = sum(sum(r.sampled) for group in kept(drawn) for r in group)
    highest = max(float(batch.weights.max()) for batch in batches)
    assert highest == pytest.approx(max(rollouts.advantages(drawn[1])) / tokens)


def test_a_step_that_teaches_nothing_has_no_gradient(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge_by_question(monkeypatch, lambda number: False)
    models = [model_of(tokenizer) for _ in range(2)]

    def step(world: World) -> list[Batch]:
        loader = loader_of(tokenizer, models[world.rank], world)
        batches = loader.next_batch()
        assert loader.metrics["reward"] == loader.metrics["reward_std"] == 0
        assert loader.metrics["frac_reward_zero_std"] == 1
        return batches

    for model, batches in zip(models, Ranks(2).run(step), strict=True):
        assert len(batches) == 1
        assert all((grad == 0).all() for grad in gradient(model, batches).values())


# ------------------------------------------------------------------------------------------------
# what is drawn


def ids_of(groups: list[Group]) -> list[list[tuple[int, ...]]]:
    return [[tuple(rollout.ids) for rollout in group] for group in groups]


def test_any_number_of_ranks_draws_the_same(tokenizer: Tokenizer, drawn: list[Group]) -> None:
    found: list[Any] = []
    for size in (1, 2, 3):
        drawn.clear()

        def step(world: World) -> dict[str, float]:
            loader = loader_of(tokenizer, model_of(tokenizer), world, reference=model_of(tokenizer, 1))
            loader.next_batch()
            return {name: value for name, value in loader.metrics.items() if name != "rollout_seconds"}

        metrics = Ranks(size).run(step)
        found.append((ids_of(drawn), metrics[0]))
        assert all(one == pytest.approx(found[0][1], rel=1e-4) for one in metrics)
    assert found[0][0] == found[1][0] == found[2][0]


def test_a_resumed_loader_draws_the_same(tokenizer: Tokenizer) -> None:
    model, world = model_of(tokenizer), World.single_process()
    whole, fresh = (loader_of(tokenizer, model, world) for _ in range(2))
    before = [whole.next_batch() for _ in range(2)]
    state = whole.state_dict()
    third = whole.next_batch()
    fresh.load_state_dict(state)
    fresh.fetch(1)
    fresh.put_back()  # a signal came
    assert fresh.state_dict() == state
    again = fresh.next_batch()
    assert fresh.state_dict() == whole.state_dict() != state

    def equal(some: list[Batch], others: list[Batch]) -> bool:
        pairs = zip(itertools.chain(*some), itertools.chain(*others), strict=False)
        return all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)

    assert len(third) == len(again)
    assert equal(third, again)
    assert not equal(third, before[1])


def test_draws_depend_on_seed_step_question_and_reply(tokenizer: Tokenizer) -> None:
    """Questions 0 and 15 ask the same."""
    first, second = (asking(tokenizer)(number, 1)[0] for number in (0, 15))
    assert first.ids == second.ids
    model = model_of(tokenizer)

    def draw(questions: list[Question], seed: int = 0, step: int = 0) -> list[Any]:
        loader = loader_of(tokenizer, model, World.single_process(), seed=seed)
        loader.load_state_dict({"format": 1, "step": step, "asked": 0})
        return ids_of(loader._groups(questions))

    both = draw([first, second])
    assert both == draw([first]) + draw([second])
    assert len({tuple(group) for group in (*both, *draw([first], seed=1), *draw([first], step=1))}) == 4
    assert len(set(both[0])) > 1


def test_the_estimates_are_those_of_the_logits(tokenizer: Tokenizer, drawn: list[Group]) -> None:
    model, start = model_of(tokenizer), model_of(tokenizer, 1)
    loader = loader_of(tokenizer, model, World.single_process(), reference=start)
    loader.next_batch()
    logs: list[tuple[float, float]] = []
    for rollout in itertools.chain.from_iterable(drawn):
        ids, drew = torch.tensor(rollout.ids), torch.tensor(rollout.sampled[1:])
        both = [
            m.logits(ids[None, :-1])[0].log_softmax(-1).gather(1, ids[1:, None])[drew, 0]
            for m in (model, start)
        ]
        logs += zip(*(one.tolist() for one in both), strict=True)
    assert loader.metrics["entropy"] == pytest.approx(-np.mean([now for now, _ in logs]), rel=1e-4)
    k3 = [np.exp(then - now) - (then - now) - 1 for now, then in logs]
    assert loader.metrics["kl"] == pytest.approx(np.mean(k3), rel=1e-3)
    loader.next_batch()
    assert "kl" not in loader.metrics


# ------------------------------------------------------------------------------------------------
# faults


def test_a_signal_leaves_nothing_drawn(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes to one rank, after the first round: all ranks stop there."""
    judge_by_question(monkeypatch, lambda number: number >= 2)
    asked: list[int] = []

    def requested() -> bool:
        asked.append(1)
        return len(asked) > 2

    monkeypatch.setattr(rollouts, "requested", requested)

    def step(world: World) -> dict[str, Any]:
        loader = loader_of(tokenizer, model_of(tokenizer), world)
        with pytest.raises(Stopped):
            loader.fetch(1)
        return loader.state_dict()

    assert Ranks(2).run(step) == [{"format": 1, "step": 0, "asked": 0}] * 2


@pytest.mark.parametrize(
    "change", [{"format": 2}, {"asked": None}, {"step": -1}, {"asked": "7"}, {"step": 1.5}, {"asked": True}]
)
def test_a_damaged_state_is_refused(tokenizer: Tokenizer, change: dict[str, Any]) -> None:
    loader = loader_of(tokenizer, model_of(tokenizer), World.single_process())
    with pytest.raises(UserError, match="counts of steps and questions"):
        loader.load_state_dict({"format": 1, "step": 3, "asked": 60} | change)
