"""A small text gets a vocabulary, a context, a batch and a horizon that suit it; a large one the recipe's."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.common import files
from nanochat.common.errors import UserError
from nanochat.config import plan as planning
from nanochat.config.arguments import TokTrainArgs, TrainArgs
from nanochat.data import corpus as corpus_module
from nanochat.data import text_size, tokenizer_texts
from nanochat.data.corpus import Corpus
from nanochat.data.text_size import TextSize
from nanochat.tokenizer.tokenizer import Tokenizer
from nanochat.train import small_text
from nanochat.train.small_text import fit
from tests.conftest import REPO
from tests.tiny import tiny_corpus, train_tiny

D4 = TrainArgs(depth=4)


def text_of(tokens: float, document: int = 1_000) -> TextSize:
    """A text of so many tokens in documents of one length."""
    lengths = np.full(max(1, min(1_000, int(tokens) // document)), document)
    return TextSize(max(1, int(tokens) // document), tokens * 4, lengths, lengths[:10])


def plan_of(args: TrainArgs, vocab_size: int, text: TextSize) -> planning.Plan:
    return planning.plan(fit(args, vocab_size, text)[0], vocab_size)


def test_a_megabyte_gets_settings_that_suit_it() -> None:
    text = text_of(370_000)
    plan = plan_of(D4, 1024, text)
    assert plan.model.sequence_len == 256
    assert plan.batch_tokens == 8192
    assert 400 <= plan.steps <= 800
    assert plan.tokens <= 10.5 * text.tokens
    assert plan.args.keep_tails is True


def test_ten_kilobytes_get_settings_that_suit_them() -> None:
    plan = plan_of(D4, 512, text_of(4_000))
    assert (plan.model.sequence_len, plan.batch_tokens) == (64, 512)
    assert 30 <= plan.steps <= 100


@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("tokens", [27_000_000, 10**9, 10**12])
def test_a_large_text_gets_the_plan_of_the_recipe(tokens: int, depth: int) -> None:
    asked = TrainArgs(depth=depth)
    assert fit(asked, 32768, text_of(tokens)) == (asked, ())


@given(
    st.integers(1, 10**9),
    st.sampled_from([1, 4, 12, 24]),
    st.sampled_from([300, 1024, 8192, 32768]),
    st.sampled_from(["nanochat-2026-07", "nanochat-2026-01", "speedrun-124m"]),
)
def test_every_size_gives_a_plan_that_runs(tokens: int, depth: int, vocab_size: int, recipe: str) -> None:
    text = text_of(tokens)
    args = TrainArgs(depth=depth, recipe=recipe)
    ours, theirs = plan_of(args, vocab_size, text), planning.plan(args, vocab_size)
    assert ours.steps >= 1
    assert ours.tokens < theirs.tokens + theirs.batch_tokens
    assert ours.batch_tokens <= theirs.batch_tokens
    assert 64 <= ours.model.sequence_len <= 2048
    assert ours.batch_tokens % ours.model.sequence_len == 0
    assert ours.tokens <= max(10 * text.tokens, ours.batch_tokens)


GIVEN: list[dict[str, Any]] = [
    {"max_seq_len": 512},
    {"max_seq_len": 100},
    {"total_batch_size": 2048 * 4},
    {"num_iterations": 50},
    {"target_param_data_ratio": 3.0},
    {"target_flops": 1e15},
    {"keep_tails": False},
    {"keep_tails": True},
]


@pytest.mark.parametrize("given", GIVEN, ids=str)
def test_what_is_given_stays(given: dict[str, Any]) -> None:
    args, told = fit(dataclasses.replace(D4, **given), 1024, text_of(370_000))
    assert {name: getattr(args, name) for name in given} == given
    flags = {name: f"(--{name.replace('_', '-')})" for name in given}
    assert not [line for line in told for flag in flags.values() if line.endswith(flag)]
    if given.keys() & {"num_iterations", "target_flops", "target_param_data_ratio"}:
        assert not any("epochs" in line for line in told)
    assert planning.plan(args, 1024).steps >= 1


def test_documents_shorter_than_the_rows_keep_no_tails() -> None:
    lengths = np.full(20_000, 20)
    args, _ = fit(
        dataclasses.replace(D4, max_seq_len=256), 1024, TextSize(20_000, 1e6, lengths, lengths[:500])
    )
    assert args.keep_tails is None


def test_a_validation_split_that_fills_no_row_keeps_its_tails() -> None:
    many, few = np.full(20_000, 20), np.array([5, 5])
    args, told = fit(dataclasses.replace(D4, max_seq_len=256), 1024, TextSize(20_000, 1e6, many, few))
    assert args.keep_tails is True
    assert "100% would be lost" in told[-1]


def test_rows_that_nothing_fills_are_refused_before_anything_is_built() -> None:
    lengths = np.array([5, 5])
    text = TextSize(2, 20, lengths, lengths)
    plan = planning.plan(TrainArgs(depth=1, max_seq_len=256, keep_tails=False), 300)
    with pytest.raises(UserError, match="Leave --no-keep-tails out, or give a shorter --max-seq-len"):
        text.require_rows(plan)
    text.require_rows(planning.plan(TrainArgs(depth=1, max_seq_len=256, keep_tails=True), 300))
    text.require_rows(planning.plan(TrainArgs(depth=1, max_seq_len=4, keep_tails=False), 300))


def test_a_vocabulary_is_of_a_size_that_the_text_fills() -> None:
    sizes = [text_size.vocab_size_for(size) for size in (0, 10_000, 10**6, 11 * 10**6, 10**8, 10**12)]
    assert sizes == [512, 512, 1024, 8192, 32768, 32768]
    steps = [text_size.vocab_size_for(size) for size in range(0, 40_000_000, 50_000)]
    assert steps == sorted(steps)


def test_the_tokenizer_takes_a_vocabulary_that_suits_the_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = (REPO / "nanochat" / "common" / "files.py").read_text("utf-8") + (
        REPO / "dev" / "LOG.md"
    ).read_text("utf-8")
    (tmp_path / "x.txt").write_text(source[:60_000], "utf-8")
    corpus = corpus_module.prepare("local", named_files=[str(tmp_path / "x.txt")])
    assert tokenizer_texts.train(corpus, TokTrainArgs()).vocab_size == 512
    assert "vocabulary: 512 entries suit 0.0" in capsys.readouterr().out
    assert tokenizer_texts.train(corpus, TokTrainArgs(vocab_size=400)).vocab_size == 400


def test_a_run_that_goes_on_keeps_what_its_beginning_decided(tmp_path: Path) -> None:
    tiny_corpus(tmp_path)
    train_tiny(num_iterations=4, keep_tails=True)
    begun = small_text.as_begun(TrainArgs(run="tiny", num_iterations=4))
    assert (begun.max_seq_len, begun.total_batch_size, begun.keep_tails) == (32, 256, True)
    given = TrainArgs(run="tiny", max_seq_len=64, keep_tails=False)
    assert small_text.as_begun(given).max_seq_len == 64
    assert small_text.as_begun(given).keep_tails is False
    (files.run_dir("tiny") / "config.json").write_text('{"args": []}')
    assert small_text.as_begun(given) == given
    assert small_text.as_begun(TrainArgs(run="another")) == TrainArgs(run="another")


def test_a_dry_run_says_epochs_and_reasons(tmp_path: Path) -> None:
    tiny_corpus(tmp_path)
    tokenizer = Tokenizer.load(files.tokenizer_dir("local"))
    plan = small_text.plan_for(TrainArgs(depth=4, dry_run=True), Corpus.open("local"), tokenizer, 1)
    told = "\n".join(plan.notices)
    assert re.search(r"text: about 0\.0\d MB .* read it \d+\.\d times", told)
    for flag in ("--max-seq-len", "--num-iterations", "--total-batch-size"):
        assert f"({flag})" in told
    json.dumps(plan.to_dict())


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("size", [10_000, 1_000_000])
def test_three_commands_without_flags_train_on_one_plain_text(size: int, tmp_path: Path) -> None:
    sources = sorted((REPO / "nanochat").glob("*.py")) + sorted((REPO / "tests").glob("*.py"))
    text = "\n\n".join(path.read_text("utf-8") for path in sources)[:size]
    (tmp_path / "one.txt").write_text(text, "utf-8")
    steps = 50 if size == 10_000 else 3
    commands = [
        ["scripts.dataset", "--corpus", "local", "--name", "n", "--files", str(tmp_path / "one.txt")],
        ["scripts.tok_train", "--corpus", "n"],
        ["scripts.base_train", "--corpus", "n", "--depth", "4", "--num-iterations", str(steps)],
    ]
    for command in commands:
        done = run(*command)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
    assert re.search(rf"text: about 0\.\d+ MB to train on, .* the {steps} steps read it", done.stdout)
    corpus = Corpus.open("n")
    held = sum(
        len(t)
        for g in range(corpus.val_shards[0].row_groups)
        for t in corpus.read_block(corpus.val_shards[0], g)
    )
    assert held >= (900 if size == 10_000 else 45_000)
    summary = json.loads((files.run_dir("d4") / "summary.json").read_text("utf-8"))
    assert summary["status"] == "finished"
    assert 0 < summary["val_bpb"] < 8
