"""Joined ids against the whole text tokenized."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.evaluation.core import bundle as core_bundle
from nanochat.evaluation.core import prompts as core_prompts
from nanochat.evaluation.core.bundle import Example, Task
from nanochat.evaluation.core.prompt_tokens import Prompts
from nanochat.evaluation.core.scoring import Clock
from nanochat.tokenizer.tokenizer import Tokenizer

PROSE = ["The cat sat; on the mat's 12 edges.\n\nAnswer: yes  no\n", "naïve   café\t\n\n x", "1, 2, 3...\n"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([*PROSE, "Question: what is a cat?\nAnswer: a pet\n\n" * 3], 340)


def whole_rows(tokenizer, task, examples, index):
    """The rows by tokenizing nanochat's whole texts."""
    shots = [
        examples[place] for place in core_prompts.draw_shots(len(examples), task.shots, "nanochat")[index]
    ]
    prefix = "".join(core_prompts.render(task, shot, "nanochat").shot for shot in shots)
    question = core_prompts.render(task, examples[index], "nanochat")
    rows = [tokenizer.encode(prefix + text, bos=True) for (text,) in question.rows]
    if question.context is None:
        return rows, None
    return rows, tokenizer.encode((prefix + question.context).strip(), bos=True)


# Much white space: that is where joining could go wrong.
TEXTS = st.text(st.sampled_from("ab1 .\n\r\t\u2028\x85\x1f\u00a0'"), max_size=8)


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=3, max_size=3), st.sampled_from(["mc", "lm", "schema"]))
def test_joined_ids_are_those_of_the_whole_text(tokenizer, pairs, kind):
    if kind == "mc":
        examples = [Example((query,), (choice, "b"), 0, n) for n, (query, choice) in enumerate(pairs)]
        task = Task("t", "multiple_choice", 2, "\nAnswer: ", "f", 0)
    elif kind == "schema":
        examples = [Example((one, two), ("x",), 1, n) for n, (one, two) in enumerate(pairs)]
        task = Task("t", "schema", 2, " ", "f", 0)
    else:
        examples = [Example((context,), (tail + "b",), 0, n) for n, (context, tail) in enumerate(pairs)]
        task = Task("t", "language_modeling", 2, " ", "f", 0)
    prompts = Prompts(tokenizer, task, examples, "nanochat", Clock())
    for index in range(3):
        expected, context_ids = whole_rows(tokenizer, task, examples, index)
        rows = prompts.spans(index, 10**6)
        assert [row.ids.tolist() for row in rows] == expected
        if context_ids is not None and expected[0][: len(context_ids)] == context_ids:
            assert rows[0].start == len(context_ids)


def test_shots_of_ordinary_text_are_joined_and_not_tokenized_again(tokenizer, monkeypatch):
    task = Task("t", "multiple_choice", 2, "\nAnswer: ", "f", 0)
    examples = [
        Example((text,), ("yes", "no"), 0, n) for n, text in enumerate(["What", "Who", "Why", " When"])
    ]
    prompts = Prompts(tokenizer, task, examples, "nanochat", Clock())

    def refuse(*_):
        raise AssertionError("tokenized again")

    monkeypatch.setattr(Tokenizer, "encode_batch", refuse)
    assert all(len(prompts.spans(index, 99)) == 2 for index in range(4))


@pytest.mark.slow
def test_prompts_of_the_real_bundle_are_joined_exactly(shared_data):
    """60 prompts of each task, with their real shots, against the whole text."""
    bundle = core_bundle.open_bundle(shared_data / "eval_bundle.zip")
    text = bundle.text("eval_data/reading_comprehension/boolq.jsonl")[:400_000]
    tokenizer = Tokenizer.train([text], 2000)
    rng = random.Random(0)
    for task in core_bundle.load_tasks(bundle):
        [group] = core_prompts.arrange(core_bundle.load_examples(bundle, task), 300, "nanochat")
        prompts = Prompts(tokenizer, task, group, "nanochat", Clock())
        for index in rng.sample(range(len(group)), min(60, len(group))):
            expected, context_ids = whole_rows(tokenizer, task, group, index)
            rows = prompts.spans(index, 10**6)
            assert [row.ids.tolist() for row in rows] == expected, task.label
            assert context_ids is None or rows[0].start == len(context_ids)
