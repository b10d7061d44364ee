"""RL: rewarded replies come more often, shuffled rewards change nothing, and a kill costs nothing."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from dev.bench import shuffled_rewards
from nanochat.chat import made, rl, rollouts, sft
from nanochat.chat.rollouts import RolloutLoader
from nanochat.checkpoint import format as checkpoint_format
from nanochat.checkpoint.format import MODEL
from nanochat.common import files
from nanochat.common.errors import UserError
from nanochat.common.machine import Precision
from nanochat.config.arguments import RlArgs, SftArgs
from nanochat.distributed.world import World
from nanochat.tokenizer.tokenizer import Tokenizer
from nanochat.train import run as train_run
from tests.chat import corpora
from tests.dist.launch import lines
from tests.dist.world import run_ranks
from tests.reliability.figures import MakeFigure
from tests.reliability.warm import resume_through_kills
from tests.test_train import stop_after, weights
from tests.tiny import flags_of, tiny_corpus, train_tiny

STEPS = 6
ARGS = RlArgs(
    base="talks",
    run="rl",
    task="gsm8k",
    num_iterations=STEPS,
    prompts=4,
    samples=8,
    max_new_tokens=12,
    lr=0.01,
    device_batch_size=2,
    device_type="cpu",
    dtype="float32",
    save_every=2,
    keep_last=3,
)
LEARNS = {"num_iterations": 30, "samples": 16, "lr": 0.3, "save_every": 0}


def question(number: int) -> dict[str, Any]:
    """It asks for the letter t, which some words have: judged as any other question is."""
    rng = random.Random(number)
    asked, said = " ".join(rng.choices(corpora.WORDS, k=rng.randint(1, 4))), rng.choice(corpora.WORDS)
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    about = {"id": str(number), "source": "words", "task": "gsm8k", "judge": "phrase", "answer": "t"}
    return {"messages": messages, **about}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base directory with a model that replies with a random word, and with questions."""
    folder = tmp_path_factory.mktemp("rl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder / "base"))
        tiny_corpus(folder)
        train_tiny(num_iterations=20, save_every=0, max_seq_len=64)
        rows = [question(number) for number in range(900)]
        corpora.write("talk", rows[300:850], rows[850:])
        corpora.write("gsm8k", rows[:300])
        args = SftArgs(
            base="tiny",
            data=("talk",),
            run="talks",
            num_iterations=60,
            init_lr_frac=2.0,
            eval_every=0,
            eval_tokens=512,
            device_type="cpu",
            dtype="float32",
        )
        plan, stage = sft.prepare(args, World.single_process())
        train_run.run(plan, stage, Precision(torch.float32, "sdpa"), World.single_process())
    return folder / "base"


@pytest.fixture(autouse=True)
def base_dir(prepared: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A base directory of each test's own, whose questions and base are shared."""
    base = tmp_path / "base"
    (base / "runs").mkdir(parents=True)
    for name in ("data", "tokenizers", "runs/tiny", "runs/talks"):
        (base / name).symlink_to(prepared / name)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    return base


def reinforce(
    world: World | None = None, precision: torch.dtype = torch.float32, **changes: Any
) -> dict[str, Any]:
    """A run of RL in this process; returns its summary."""
    world = world or World.single_process()
    plan, stage = rl.prepare(dataclasses.replace(ARGS, **changes), world)
    return train_run.run(plan, stage, Precision(precision, "sdpa"), world)


def mean_reward(run: str, steps: slice) -> float:
    rewards = [line["reward"] for line in lines(run)][steps]
    return sum(rewards) / len(rewards)


def test_rewarded_replies_come_more_often() -> None:
    summary = reinforce(**LEARNS)
    assert (summary["status"], summary["steps"]) == ("finished", 30)
    before, after = (mean_reward("rl", part) for part in (slice(0, 3), slice(-3, None)))
    assert after > before + 0.15
    steps = lines("rl")
    assert [line["step"] for line in steps if "kl" in line] == [0, 10, 20]
    assert steps[0]["kl"] == 0 < steps[20]["kl"]
    assert steps[0]["entropy"] > 0
    assert steps[-1]["lr"] == pytest.approx(steps[0]["lr"] / 30)
    config = json.loads((files.run_dir("rl") / "config.json").read_text())
    assert (config["finetune"]["stage"], config["finetune"]["base"]) == ("rl", "talks")
    assert config["finetune"]["settings"] == {
        "task": "gsm8k", "prompts": 4, "samples": 16, "max_new_tokens": 12, "lr": 0.3,
    }  # fmt: skip
    assert all(group["weight_decay"] == 0 for group in config["groups"].values())


@pytest.mark.slow
def test_shuffled_rewards_teach_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: the same rewards, dealt to other replies of the step."""
    monkeypatch.setattr(RolloutLoader, "_groups", shuffled_rewards.dealing(RolloutLoader._groups))
    reinforce(**LEARNS)
    before, after = (mean_reward("rl", part) for part in (slice(0, 3), slice(-3, None)))
    assert abs(after - before) < 0.12


def test_it_begins_with_the_weights_of_the_base_alone() -> None:
    world = World.single_process()
    plan, stage = rl.prepare(ARGS, world)
    state = train_run.create_state(plan, stage, Precision(torch.float32, "sdpa"), world)
    stage.begin(state, world)
    then = checkpoint_format.read_tensors(checkpoint_format.folder_of("talks", 60) / MODEL)
    assert all(torch.equal(p, then[name]) for name, p in state.model.named_parameters())
    assert not any(moment.any() for moment in state.optimizer.state_tensors().values())


def test_it_computes_in_bf16_too() -> None:
    reinforce(num_iterations=2, dtype="bfloat16", precision=torch.bfloat16)
    assert abs(lines("rl")[0]["kl"]) < 1e-3


@pytest.mark.parametrize("at", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_a_stopped_run_resumes_to_the_bit(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollouts, "MEASURED_EVERY", 2)
    reinforce(run="whole")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(at, patch)
        assert reinforce(run="parts")["status"] == "stopped"
    reinforce(run="parts", resume="auto")
    assert lines("parts") == lines("whole")
    assert weights("parts", STEPS) == weights("whole", STEPS)


def reinforce_rank(world: World, changes: dict[str, Any]) -> None:
    reinforce(world, **changes)


@pytest.mark.slow
def test_two_ranks_learn_the_same(tmp_path: Path) -> None:
    reinforce(run="one", num_iterations=3)
    run_ranks(2, tmp_path, reinforce_rank, {"run": "two", "num_iterations": 3, "device_batch_size": 1})
    for one, two in zip(lines("one"), lines("two"), strict=True):
        for name in ("reward", "loss", "grad_norm", "completions/mean_length"):
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name


def test_questions_come_once_in_an_epoch_and_in_another_order_in_the_next() -> None:
    tokenizer = Tokenizer.load(files.tokenizer_dir("local"))
    rows = [question(number) for number in range(20)]
    asked = rl.Questions(rows, tokenizer, 64, seed=5).ask(0, 40)
    assert [one.number for one in asked] == list(range(40))
    epochs = [[one.row["id"] for one in part] for part in (asked[:20], asked[20:])]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(row["id"] for row in rows)
    assert epochs[0] != epochs[1]
    assert [one.row["id"] for one in rl.Questions(rows, tokenizer, 64, seed=6).ask(0, 20)] != epochs[0]
    context = sorted(len(one.ids) for one in asked[:20])[10]
    fewer = rl.Questions(rows, tokenizer, context, seed=5).ask(0, 20)
    assert all(len(one.ids) < context for one in fewer)


def test_bigsum_never_asks_twice() -> None:
    plan, stage = rl.prepare(
        dataclasses.replace(ARGS, task="bigsum", num_iterations=None), World.single_process()
    )
    assert plan.steps == 64
    asked = stage.questions.ask(0, plan.steps * ARGS.prompts * 2)
    prompts = {one.row["messages"][0]["content"] for one in asked}
    assert len(prompts) == len(asked)
    tests = {row["messages"][0]["content"] for row in made.examples("bigsum", "test", 400, 0)}
    assert not prompts & tests


def test_an_epoch_is_the_horizon() -> None:
    plan, stage = rl.prepare(dataclasses.replace(ARGS, num_iterations=None), World.single_process())
    assert plan.steps == len(stage.questions.rows) // ARGS.prompts == 75


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"base": ""}, "--base is missing"),
        ({"base": "tiny"}, "no chat model.*scripts.chat_sft --base tiny"),
        ({"base": "nobody"}, "unknown run 'nobody'"),
    ],
)
def test_what_cannot_learn_is_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        reinforce(**changes)


def test_questions_without_room_for_a_reply_are_refused() -> None:
    tokenizer = Tokenizer.load(files.tokenizer_dir("local"))
    with pytest.raises(UserError, match="none of the 3 questions leaves room"):
        rl.Questions([question(number) for number in range(3)], tokenizer, 4, seed=0)


def test_another_run_is_refused() -> None:
    reinforce(num_iterations=2)
    others = {
        "lr": {"lr": 0.02},
        "--seed": {"seed": 3},
        "samples": {"samples": 4},
        "task": {"task": "bigsum"},
        "max_new_tokens": {"max_new_tokens": 13},
    }
    for named, changes in others.items():
        with pytest.raises(UserError, match=f"cannot be resumed.*{named}"):
            reinforce(num_iterations=2, resume="auto", **changes)


@pytest.mark.slow
def test_kills_at_random_moments_cost_nothing(tmp_path: Path, figure: MakeFigure) -> None:
    """Twenty kills with SIGKILL, wherever they fall, and then the end: the same bits."""
    steps = 40
    reinforce(run="whole", num_iterations=steps, save_every=0)
    tried = figure("P4", "kill -9 of chat_rl at a random moment, resumed to the end")
    asked = dataclasses.replace(ARGS, run="parts", num_iterations=steps, resume="auto")
    resume_through_kills(flags_of(asked), tmp_path, "chat_rl", tried)
    assert weights("parts", steps) == weights("whole", steps)
    assert lines("parts") == lines("whole")
