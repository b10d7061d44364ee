"""Evaluation of a chat model against slow twins: each item alone, means by hand, pass@k by enumeration."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
import shutil
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat.chat import conversation, evaluate, made, tasks
from nanochat.chat.replies import ReplyEngine
from nanochat.common import files
from nanochat.common.errors import UserError
from nanochat.common.machine import Precision
from nanochat.common.run_files import ChatAnswer
from nanochat.common.stop_signals import Stopped
from nanochat.config import plan as planning
from nanochat.config.arguments import SftArgs, TrainArgs
from nanochat.distributed.world import World
from nanochat.engine import Sampling
from nanochat.evaluation import chat_scores
from nanochat.evaluation.chat_scores import WITH_FLOOR, ChatResult, TaskScore
from nanochat.evaluation.core.statistics import exact_mcnemar, holm
from nanochat.evaluation.score_files import digest_of
from nanochat.model.gpt import GPT
from nanochat.tokenizer.tokenizer import Tokenizer
from nanochat.train.run_log import RunLog
from scripts import chat_eval
from tests.tiny import WORDS, read_metrics, tiny_corpus, train_tiny

SOLO = World.single_process()
GREEDY = Sampling(12, temperature=0.0)
CONTEXT = 128
SHAPE = TrainArgs(depth=2, aspect_ratio=16, head_dim=16, max_seq_len=CONTEXT)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([" ".join(WORDS) + "."], 300)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> GPT:
    """A model whose answers depend on what is asked; a fresh one's matrices are zero where they end."""
    made_model = GPT(planning.plan(SHAPE, tokenizer.vocab_size).model, Precision(torch.float32, "sdpa"))
    made_model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    for parameter in made_model.parameters():
        if parameter.dim() > 1:
            parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator)
    return made_model.eval()


def choices(count: int, longest: int = 20) -> list[tasks.Row]:
    """Multiple-choice items of three to five options and of many lengths, some beyond the context."""
    draw = random.Random(0)
    rows = []
    for number in range(count):
        letters = list("ABCDE"[: draw.choice((3, 4, 5))] if draw.random() < 0.9 else "1234")
        options = "".join(f"- {draw.choice(WORDS)}={letter}\n" for letter in letters)
        text = " ".join(draw.choices(WORDS, k=draw.randint(3, longest)))
        answer = draw.choice(letters)
        messages = [
            {"role": "user", "content": f"{text}\n{options}"},
            {"role": "assistant", "content": answer},
        ]
        row = {"messages": messages, "id": f"c{number}", "judge": "letter", "answer": answer}
        rows.append({**row, "letters": letters})
    return rows


@torch.no_grad()
def letter_alone(model: GPT, tokenizer: Tokenizer, row: tasks.Row) -> str:
    """karpathy/nanochat's rule, a problem at a time: argmax over the letters' ids at the last position."""
    marks = [
        tokenizer.special_id(f"<|{name}|>") for name in ("bos", "user_start", "user_end", "assistant_start")
    ]
    ids = [*marks[:2], *tokenizer.encode(row["messages"][0]["content"]), *marks[2:]]
    model.reserve_positions(max(len(ids), CONTEXT))
    logits = model.logits(torch.tensor([ids]))[0, -1]
    letters = [tokenizer.encode(letter) for letter in row["letters"]]
    assert all(len(one) == 1 for one in letters)
    focus = logits[torch.tensor([one[0] for one in letters])]
    return str(row["letters"][int(focus.argmax())])


def test_letters_are_those_of_a_plain_forward_pass_on_200_problems(model: GPT, tokenizer: Tokenizer) -> None:
    rows = choices(200, longest=90)
    result = evaluate.evaluate(model, tokenizer, {"mmlu": rows}, SOLO, sampling=GREEDY)
    chosen = [answer["reply"][0]["text"] for answer in result.answers]
    alone = [letter_alone(model, tokenizer, row) for row in rows]
    assert chosen == alone
    assert (
        result.accuracies["mmlu"] == sum(a == row["answer"] for a, row in zip(alone, rows, strict=True)) / 200
    )
    assert len({*chosen}) > 3
    beyond = [a for a in result.answers if len(tokenizer.encode(a["prompt"])) > CONTEXT]
    assert len(beyond) > 20


def test_replies_are_those_of_each_prompt_alone(model: GPT, tokenizer: Tokenizer) -> None:
    questions = tasks.questions("calc,repeat,date", 8, 0)
    sampling = Sampling(10, temperature=1.0, seed=4)
    result = evaluate.evaluate(model, tokenizer, questions, SOLO, sampling=sampling, num_samples=2)
    engine, answers = ReplyEngine(model, tokenizer), iter(result.answers)
    for task, rows in questions.items():
        for row in rows:
            asked = conversation.read(row, "here")[:-1]
            ids = conversation.prompt(tokenizer, asked)
            (alone,) = engine.replies([ids], sampling, 2, names=[f"{task}/{row['id']}"])
            for sample, reply in enumerate(alone):
                answer, parts = next(answers), conversation.parts_of(tokenizer, reply.ids)
                assert answer["reply"] == [{"type": part.kind, "text": part.text} for part in parts]
                assert (answer["id"], answer["sample"], answer["reason"]) == (row["id"], sample, reply.reason)
                assert answer["sampled"] == sum(reply.sampled)
                assert answer["right"] == (reply.reason == "stop" and tasks.right(row, parts))
                assert answer["prompt"] == row["messages"][0]["content"]


@dataclasses.dataclass(frozen=True)
class Threads(World):
    """Ranks that are threads of this process."""

    shared: Any = None

    def gather_ints(self, values: list[int]) -> list[list[int]]:
        board, barrier = self.shared
        board[self.rank] = values
        barrier.wait()
        gathered = [board[rank] for rank in range(self.size)]
        barrier.wait()
        return gathered

    def max_over_ranks(self, value: int) -> int:
        return max(max(values) for values in self.gather_ints([value]))


def on_ranks(count: int, work: Any) -> list[Any]:
    shared = ({}, threading.Barrier(count))
    found: list[Any] = [None] * count

    def one(rank: int) -> None:
        try:
            found[rank] = work(Threads(rank, count, torch.device("cpu"), None, shared=shared))
        except Stopped as error:
            found[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_any_number_of_ranks_gives_the_same_answers(
    model: GPT, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "BATCH_REPLIES", 5)
    monkeypatch.setattr(evaluate, "BATCH_TOKENS", 300)
    questions = {**tasks.questions("calc,identity", 9, 0), "mmlu": choices(20)}
    alone = evaluate.evaluate(model, tokenizer, questions, SOLO, sampling=GREEDY)
    for ranks in (2, 3):
        shared = on_ranks(
            ranks, lambda world: evaluate.evaluate(model, tokenizer, questions, world, sampling=GREEDY)
        )
        assert all(one.answers == alone.answers for one in shared)


def test_a_signal_on_one_rank_stops_all(model: GPT, tokenizer: Tokenizer) -> None:
    questions: dict[str, Sequence[tasks.Row]] = {"mmlu": choices(5)}
    stopped = on_ranks(
        2,
        lambda world: evaluate.evaluate(
            model, tokenizer, questions, world, sampling=GREEDY, stop_requested=lambda: world.rank == 1
        ),
    )
    assert [type(one) for one in stopped] == [Stopped, Stopped]


def test_the_model_is_left_as_it_was(model: GPT, tokenizer: Tokenizer) -> None:
    model.train().reserve_positions(CONTEXT)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tables = model.cos, model.sin
    questions = {**tasks.questions("calc", 3, 0), "mmlu": choices(20, longest=90)}
    evaluate.evaluate(model, tokenizer, questions, SOLO, sampling=GREEDY)
    assert model.training
    assert all(one is two for one, two in zip((model.cos, model.sin), tables, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    model.eval()


def test_a_reply_that_was_cut_off_is_no_answer_but_by_upstreams_rules(
    model: GPT, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "right", lambda row, reply: True)
    row = tasks.questions("calc", 1, 0)["calc"][0]
    rows = [{**row, "id": judge, "judge": judge} for judge in ("number", "exact", "gsm8k", "code")]
    short = Sampling(1, temperature=0.0)
    result = evaluate.evaluate(model, tokenizer, {"calc": rows}, SOLO, sampling=short)
    assert [one["reason"] for one in result.answers] == ["length"] * 4
    assert [one["right"] for one in result.answers] == [False, False, True, True]


def test_what_the_model_cannot_read_counts_as_wrong_and_is_counted(model: GPT, tokenizer: Tokenizer) -> None:
    rows = tasks.questions("calc", 3, 0)["calc"]
    long = {
        **rows[0],
        "id": "long",
        "messages": [{"role": "user", "content": "x" * (CONTEXT + 1)}, rows[0]["messages"][1]],
    }
    endless = {**choices(1)[0], "id": "endless"}
    endless["messages"] = [{"role": "user", "content": "x" * (10 * CONTEXT + 1)}, endless["messages"][1]]
    questions = {"calc": [*rows, long], "mmlu": [*choices(3), endless]}
    result = evaluate.evaluate(model, tokenizer, questions, SOLO, sampling=GREEDY, num_samples=2)
    for task, identity, replies in (("calc", "long", 2), ("mmlu", "endless", 1)):
        of_it = [answer for answer in result.answers if answer["id"] == identity]
        assert [(a["right"], a["reply"], a["reason"]) for a in of_it] == [(False, [], "context")] * replies
        fields = result.tasks[task].as_dict()
        assert (fields["too_long"], fields["examples"]) == (replies, 4)


# -----------------------------------------------------------------------------
# Scores


def answer(task: str, number: int, right: bool | None, sample: int = 0, prompt: str = "") -> ChatAnswer:
    return {
        "task": task,
        "id": str(number),
        "sample": sample,
        "judge": "number",
        "prompt": prompt or f"question {number}",
        "reply": [{"type": "text", "text": "x"}],
        "right": right,
        "sampled": 1,
        "reason": "stop",
    }


def scored(of: dict[str, float], n: int = 10_000) -> ChatResult:
    """A result with these accuracies."""
    return ChatResult(tuple(answer(task, i, i < round(p * n)) for task, p in of.items() for i in range(n)))


# karpathy/nanochat's README of October 2025, d20 after SFT.
D20 = {"arc-easy": 0.3876, "arc-challenge": 0.2807, "mmlu": 0.3151, "gsm8k": 0.0455, "humaneval": 0.0854}


def test_chatcore_of_the_published_d20_row() -> None:
    result = scored(D20)
    found = result.mean("ChatCORE")
    assert found is not None
    assert round(found["value"], 4) == 0.0884
    # By hand: binomial errors, on the centered scale, of a mean of five.
    errors = [
        math.sqrt(p * (1 - p) / 10_000) / (0.75 if "gs" not in t and t != "humaneval" else 1)
        for t, p in D20.items()
    ]
    assert found["stderr"] == pytest.approx(math.hypot(*errors) / 5, rel=0.05)
    assert found["low"] < found["value"] < found["high"]
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * found["stderr"], rel=0.1)
    assert result.mean("ChatCORE6") is None
    six = scored(D20 | {"spellingbee": 0.5}, 1000).mean("ChatCORE6")
    assert six is not None
    assert six["value"] == pytest.approx((5 * 0.0884 + 0.5) / 6, abs=1e-3)


def test_a_mean_is_absent_where_a_task_is_missing_or_was_not_judged() -> None:
    missing = scored({task: p for task, p in D20.items() if task != "mmlu"}, 100)
    assert missing.mean("ChatCORE") is None
    whole = scored(D20, 100)
    unjudged = ChatResult((*whole.answers[:-1], whole.answers[-1] | {"right": None}))  # type: ignore[operator]
    assert unjudged.mean("ChatCORE") is None
    assert "humaneval" not in unjudged.accuracies
    fields = unjudged.tasks["humaneval"].as_dict()
    assert (fields["accuracy"], fields["centered"], fields["unjudged"]) == (None, None, 1)


def test_made_is_the_mean_of_the_eight_tasks_with_a_floor() -> None:
    found = scored(dict.fromkeys(made.TASKS, 0.5), 100).mean("MADE")
    assert found is not None
    assert found["value"] == pytest.approx((7 * 0.5 + (0.5 - 0.25) / 0.75) / 8)


def test_an_item_asked_again_is_no_evidence_of_its_own() -> None:
    once = TaskScore("calc", [answer("calc", i, i % 4 == 0) for i in range(100)]).as_dict()
    again = [answer("calc", i, i % 4 == 0, prompt=f"q{i % 100}") for i in range(400)]
    repeated = TaskScore("calc", again).as_dict()
    assert once["stderr"] == pytest.approx(math.sqrt(0.25 * 0.75 / 100))
    assert repeated["stderr"] == pytest.approx(once["stderr"], rel=0.01)
    assert repeated["interval"] == pytest.approx(once["interval"], abs=0.001)


@pytest.mark.parametrize("n", [2, 5, 6])
def test_pass_at_k_is_that_of_all_subsets(n: int) -> None:
    draw = random.Random(n)
    items = [[draw.random() < 0.4 for _ in range(n)] for _ in range(7)]
    answers = [
        answer("gsm8k", i, right, sample) for i, of in enumerate(items) for sample, right in enumerate(of)
    ]
    found = TaskScore("gsm8k", answers).as_dict()
    assert [*found["pass_at"]] == [str(k) for k in sorted({1, 2, n, *([4] if n > 4 else [])})]
    for k, value in found["pass_at"].items():
        passed = [any(subset) for of in items for subset in itertools.combinations(of, int(k))]
        assert value == pytest.approx(sum(passed) / len(passed))
    assert found["accuracy"] == pytest.approx(found["pass_at"]["1"])


def test_two_runs_are_compared_by_item() -> None:
    a, b = scored({"calc": 0.5, "unit": 0.9}, 40), scored({"calc": 0.2, "unit": 0.9}, 40)
    means, (calc, unit) = chat_scores.compare(a, b)
    assert means == []
    assert (calc.first, calc.second, calc.only, calc.pairs) == (0.5, 0.2, (12, 0), 40)
    assert calc.p_value == exact_mcnemar(12, 0)
    assert [calc.p_holm, unit.p_holm] == holm([calc.p_value, 1.0])
    eight = [scored(dict.fromkeys(WITH_FLOOR, p), 40) for p in (0.5, 0.75)]
    (mean,), _ = chat_scores.compare(*eight)
    assert mean.name == "MADE"
    assert mean.second - mean.first == pytest.approx((7 * 0.25 + 0.25 / 0.75) / 8)
    assert mean.stderr == pytest.approx(math.sqrt(0.25 * 0.75 / 40 * (7 + 1 / 0.75**2)) / 8)


def test_several_replies_to_an_item_are_one_pair() -> None:
    a = ChatResult(tuple(answer("calc", i, sample < 1, sample) for i in range(10) for sample in range(4)))
    b = ChatResult(
        tuple(answer("calc", i, sample < 2 + i % 2, sample) for i in range(10) for sample in range(4))
    )
    _, (calc,) = chat_scores.compare(a, b)
    assert (calc.pairs, calc.only, calc.exact) == (10, (0, 10), False)
    assert calc.second - calc.first == pytest.approx(0.375)
    assert calc.stderr == pytest.approx(0.125 / math.sqrt(10))


# -----------------------------------------------------------------------------
# The command


@pytest.fixture
def base_run(tmp_path: Path) -> str:
    """A base model, which has never seen a conversation."""
    tiny_corpus(tmp_path)
    train_tiny(max_seq_len=128, total_batch_size=512, num_iterations=3, eval_every=0)
    return "tiny"


def command(monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    monkeypatch.setattr(sys, "argv", ["chat_eval", "--device-type=cpu", "--dtype=float32", *flags])
    chat_eval.main.__wrapped__()  # type: ignore[attr-defined]  # the error itself, not its line


def test_the_command_scores_keeps_and_compares(
    base_run: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ("--max-per-task=20", "--max-new-tokens=8")
    command(monkeypatch, "--run=tiny", "--tasks=made", *few)
    folder, printed = files.run_dir("tiny"), capsys.readouterr().out
    made_scores = files.read_json(folder / "chat_eval.json")
    assert "MADE" in printed
    assert "identity" in printed
    # The control: a model that has seen no conversation answers nothing but by guessing among letters.
    assert all(one["accuracy"] < 0.05 for task, one in made_scores["tasks"].items() if "choice" not in task)
    assert made_scores["means"]["ChatCORE"] is None
    assert (made_scores["step"], made_scores["settings"]["max_per_task"]) == (3, 20)

    command(monkeypatch, "--run=tiny", "--tasks=calc,spellingbee", *few)
    again = files.read_json(folder / "chat_eval.json")
    assert again["tasks"].keys() == made_scores["tasks"].keys() | {"spellingbee"}
    assert again["means"]["MADE"] == made_scores["means"]["MADE"]
    lines = [json.loads(line) for line in (folder / "chat_answers.jsonl").read_text().splitlines()]
    assert len(lines) == sum(one["examples"] for one in again["tasks"].values())
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]

    command(monkeypatch, "--run=tiny", "--tasks=calc", "--max-per-task=5", "--max-new-tokens=8")
    assert files.read_json(folder / "chat_eval.json")["tasks"].keys() == {
        "calc"
    }  # other settings, other scores
    capsys.readouterr()
    command(monkeypatch, "--compare", "tiny", "tiny")
    shown = capsys.readouterr().out
    assert "tiny against tiny" in shown
    assert "0.0000" in shown
    assert "was" not in shown
    other = files.run_dir("other")
    shutil.copytree(folder, other)
    fields = files.read_json(other / "chat_eval.json")
    fields["settings"]["tools"] = False
    files.write_json(other / "chat_eval.json", fields)
    command(monkeypatch, "--compare", "tiny", "other")
    assert "tools was True for tiny, False for other" in capsys.readouterr().out


def test_what_the_command_refuses(base_run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = files.run_dir("tiny")
    for flags, said in (
        ([], "--run is missing"),
        (["--run=tiny", "--tasks=made,x"], "no task x"),
        (["--run=tiny", "--tasks=mmlu"], "scripts.chat_data --corpus mmlu"),
        (["--run=nowhere", "--tasks=calc"], "nowhere"),
        (["--compare", "tiny"], "expected two runs"),
        (["--compare", "tiny", "tiny"], "Score it: python -m scripts.chat_eval --run tiny"),
    ):
        with pytest.raises(UserError, match=said):
            command(monkeypatch, *flags)
        assert not (folder / "chat_eval.json").exists()
    command(monkeypatch, "--run=tiny", "--tasks=calc", "--max-per-task=3", "--max-new-tokens=4")
    answers = folder / "chat_answers.jsonl"
    whole = answers.read_bytes()
    for damage in (whole.splitlines(keepends=True)[0], b"", whole.replace(b"calc", b"unit")):
        answers.write_bytes(damage)
        with pytest.raises(UserError, match=r"chat_answers\.jsonl: these are not the answers"):
            command(monkeypatch, "--compare", "tiny", "tiny")
    answers.write_bytes(whole)
    other = files.run_dir("other")
    other.mkdir()
    lines = whole.replace(b'"id": "calc', b'"id": "calx')
    (other / "chat_answers.jsonl").write_bytes(lines)
    fields = files.read_json(folder / "chat_eval.json") | {"answers_sha256": digest_of(lines)}
    files.write_json(other / "chat_eval.json", fields)
    with pytest.raises(UserError, match="were asked different items"):
        command(monkeypatch, "--compare", "tiny", "other")


def test_the_hook_of_a_training_run_logs_accuracies_by_task(
    model: GPT, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    plan = planning.plan(dataclasses.replace(SHAPE, num_iterations=10), tokenizer.vocab_size)
    log = RunLog(tmp_path, True, 0)
    assert evaluate.hooks(plan, SftArgs(), tokenizer, SOLO, log) == []
    args = SftArgs(chat_eval_every=5, chat_eval_tasks="calc,choice", chat_eval_max_per_task=4)
    (hook,) = evaluate.hooks(plan, args, tokenizer, SOLO, log)
    assert [step for step in range(11) if hook.due(step, 10)] == [0, 5, 10]
    state: Any = type("State", (), {"model": model, "step": 5})
    hook.action(state)
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert (line["kind"], line["step"]) == ("chat_eval", 5)
    assert line["scores"].keys() == {"calc", "choice"}
