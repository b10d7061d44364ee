"""Chat corpora of random conversations, and a tokenizer that makes several tokens of a word."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Iterable
from typing import Any

from nanochat.chat.corpus import ChatCorpus
from nanochat.common import files
from nanochat.data.corpus import write_corpus
from nanochat.tokenizer.tokenizer import Tokenizer

TEXT = "the cat sat on a mat and saw two dogs near their red house while rain fell over hills"
WORDS = TEXT.split()
Row = dict[str, Any]


@functools.cache
def tokenizer(vocab_size: int = 300) -> Tokenizer:
    return Tokenizer.train([TEXT + "?. 0123456789+="], vocab_size)


def random_row(rng: random.Random, number: int, longest: int = 12) -> Row:
    """A conversation of one to three turns, some with a system text, some with a call of the calculator."""

    def words() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, longest)))

    messages: list[Row] = [{"role": "system", "content": words()}] if rng.random() < 0.1 else []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        reply: str | list[Row] = words()
        if rng.random() < 0.2:
            texts = (("text", words()), ("python", "1+2"), ("python_output", "3"), ("text", words()))
            reply = [{"type": kind, "text": text} for kind, text in texts]
        messages += [{"role": "user", "content": words()}, {"role": "assistant", "content": reply}]
    return {"messages": messages, "id": str(number), "source": "random"}


def random_rows(count: int, seed: int, longest: int = 12) -> list[Row]:
    rng = random.Random(seed)
    return [random_row(rng, number, longest) for number in range(count)]


def write(name: str, train: Iterable[Row], val: Iterable[Row] = (), test: Iterable[Row] = ()) -> ChatCorpus:
    """A corpus of these rows in the base directory of the test."""
    texts = ([json.dumps(row) for row in rows] for rows in (train, val, test))
    write_corpus(files.data_dir(name), "rows of a test", *texts, kind=ChatCorpus)
    return ChatCorpus.open(name)
