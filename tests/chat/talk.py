"""Random conversations as they stand in a file, and the slow twin of the format."""

from __future__ import annotations

import argparse
import functools
import random
from pathlib import Path
from typing import Any

from nanochat.chat.conversation import Conversation
from nanochat.tokenizer.tokenizer import SPECIALS, Tokenizer

PIECES = (
    *(
        "the cat",
        " sat",
        "on",
        "347",
        "+",
        " 1,000.5",
        "'s",
        "'",
        '"',
        "\n",
        "\n\n",
        " ",
        "   ",
        "\t",
        "\r\n",
    ),
    *("caf\u00e9", "e\u0301", "\U0001f600", "\U0001f468\u200d\U0001f469", "\u4f60\u597d", "\u0645", "\ufeff"),
    *("\x00", "\u2028", "\ufffd", "<|", "|>", "<", ">", "<|bos", "|user_end|>", "<|USER_START|>", "{{ x }}"),
    *("{% raw %}", "\\n", "def f():\n    return 1", "#### 4", "\u00a0", "\uff1c|bos|\uff1e"),
)
KINDS = ("text", "python", "python_output")


@functools.cache
def tokenizer() -> Tokenizer:
    """A small tokenizer that has merges of prose, code and some characters of several bytes."""
    text = Path(argparse.__file__).read_text("utf-8")
    return Tokenizer.train([text, "caf\u00e9 \u4f60\u597d \U0001f600" * 5], 1000)


def random_text(rng: random.Random, forged: bool = False) -> str:
    """A text of no to seven pieces; with `forged`, among pieces that spell special tokens."""
    return "".join(rng.choices(PIECES + SPECIALS * forged, k=rng.choice((0, 0, 1, 2, 3, 7))))


def random_row(rng: random.Random, forged: bool = False) -> dict[str, Any]:
    """A conversation that can be trained on: one to four turns, contents in all forms."""

    def content(kinds: tuple[str, ...]) -> str | list[dict[str, str]]:
        if rng.random() < 0.4:
            return random_text(rng, forged)
        drawn = rng.choices(kinds, k=rng.randrange(5))
        return [{"type": kind, "text": random_text(rng, forged)} for kind in drawn]

    messages = [{"role": "system", "content": content(KINDS[:1])}] * (rng.random() < 0.3)
    for _ in range(rng.choice((1, 1, 2, 4))):
        messages.append({"role": "user", "content": content(KINDS[:1])})
        messages.append({"role": "assistant", "content": content(KINDS)})
    messages[-1]["content"] = messages[-1]["content"] or "Yes."
    if isinstance(last := messages[-1]["content"], list):
        last.append({"type": "text", "text": "No."})
    return {"messages": messages, "id": str(rng.random()), "source": "random"}


def twin(tokenizer: Tokenizer, conversation: Conversation) -> tuple[list[int], list[bool]]:
    """Ids and mask of a conversation, one piece after another."""
    ids: list[int] = []
    mask: list[bool] = []

    def put(piece: str | list[int], supervised: bool) -> None:
        more = [tokenizer.special_id(piece)] if isinstance(piece, str) else piece
        ids.extend(more)
        mask.extend([supervised] * len(more))

    put("<|bos|>", False)
    messages = list(conversation)
    before = ""
    if messages[0].role == "system":
        before = "".join(part.text for part in messages.pop(0).parts) + "\n\n"
    for number, message in enumerate(messages):
        if number % 2 == 0:
            assert message.role == "user"
            text = "".join(part.text for part in message.parts)
            put("<|user_start|>", False)
            put(tokenizer.encode(before + text), False)
            put("<|user_end|>", False)
            before = ""
            continue
        assert message.role == "assistant"
        put("<|assistant_start|>", False)
        for part in message.parts:
            if part.kind == "text":
                put(tokenizer.encode(part.text), True)
            elif part.kind == "python":
                put("<|python_start|>", True)
                put(tokenizer.encode(part.text), True)
                put("<|python_end|>", True)
            else:
                put("<|output_start|>", False)
                put(tokenizer.encode(part.text), False)
                put("<|output_end|>", False)
        put("<|assistant_end|>", True)
    return ids, mask
