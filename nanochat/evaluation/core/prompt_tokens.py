"""Prompts of CORE as tokens: every text is tokenized once, and texts are joined into rows.

A shot stands in front of many questions. Its ids are joined with what follows instead of being tokenized
again, wherever that gives the ids of the whole text: our pattern ends a piece after a run of newlines,
whatever follows it, unless that is another newline behind white space. Elsewhere (such a text, another
tokenizer) the whole text is tokenized.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import time
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nanochat.evaluation.core import prompts
from nanochat.evaluation.core.batching import Ids, Span, common_prefix
from nanochat.evaluation.core.bundle import SCHEMA, Example, Task
from nanochat.evaluation.core.prompts import DCLM
from nanochat.evaluation.core.scoring import Clock
from nanochat.tokenizer.tokenizer import PATTERN

# What would draw the newlines before it into its own piece.
STARTS_WITH_NEWLINE = re.compile(r"\s*[\r\n]")


class Encoder(Protocol):
    """A tokenizer, as CORE uses it."""

    @property
    def bos_id(self) -> int:
        """Id that stands before every text."""

    @property
    def pattern(self) -> str:
        """The regex that splits text into pieces."""

    def encode_batch(
        self, texts: Sequence[str], num_threads: int | None = None
    ) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Ids of all texts end to end, and (texts + 1,) offsets."""


class Prompts:
    """The prompts of one group of examples, as token rows."""

    def __init__(
        self, tokenizer: Encoder, task: Task, examples: Sequence[Example], variant: str, clock: Clock
    ) -> None:
        """Render all texts and tokenize them.

        Args:
            tokenizer: the model's.
            task: theirs.
            examples: a group of prompts.arrange.
            variant: a key of prompts.SEPARATORS.
            clock: counts the seconds.
        """
        started = time.perf_counter()
        # A lone example has no shots, and DCLM writes no separator where there is no shot before it.
        task = dataclasses.replace(task, shots=min(task.shots, len(examples) - 1))
        self._questions = [prompts.render(task, example, variant) for example in examples]
        self._shots = prompts.draw_shots(len(examples), task.shots, variant)
        texts: dict[str, None] = {}
        for question in self._questions:
            shots = (question.shot, question.last_shot) if task.shots else ()
            context = () if question.context is None else (question.context,)
            texts |= dict.fromkeys(itertools.chain(shots, *question.rows, context))
        started = clock.add("rendering", started)
        ids, offsets = tokenizer.encode_batch(list(texts))
        self._ids = dict(zip(texts, np.split(ids.astype(np.int32), offsets[1:-1]), strict=True))
        clock.add("tokenizing", started)
        self._kind, self._variant, self._tokenizer = task.kind, variant, tokenizer
        self._bos = np.array([tokenizer.bos_id], np.int32)

    def tokens(self, index: int) -> int:
        """About how many tokens a forward pass over an example takes: its shots and its longest row."""
        shots = sum(len(self._ids[self._questions[shot].shot]) for shot in self._shots[index])
        return shots + max(sum(len(self._ids[text]) for text in row) for row in self._questions[index].rows)

    def spans(self, index: int, crop_tokens: int) -> list[Span]:
        """One example's options as tokens, whole, or cut to their last `crop_tokens` tokens."""
        question, shots = self._questions[index], self._shots[index]
        before = [self._questions[shot].shot for shot in shots[:-1]]
        before += [self._questions[shot].last_shot for shot in shots[-1:]]
        if self._variant == DCLM:
            head = [self._bos, self._joined(before)]
            rows = [np.concatenate([*head, *(self._ids[text] for text in row)]) for row in question.rows]
            ends = [len(self._ids[row[-1]]) for row in question.rows]
            starts = [len(row) - end for row, end in zip(rows, ends, strict=True)]
        else:
            rows = [np.concatenate([self._bos, self._joined([*before, *row])]) for row in question.rows]
            starts = self._nanochat_starts(rows, before, question.context)
        # The first token that cropping leaves has no past, so it is never scored.
        cuts = [max(0, len(row) - crop_tokens) for row in rows]
        return [
            Span(row[cut:], max(1, start - cut), cut > 0)
            for row, start, cut in zip(rows, starts, cuts, strict=True)
        ]

    def _nanochat_starts(self, rows: list[Ids], before: list[str], context: str | None) -> list[int]:
        if self._kind == SCHEMA:
            common = common_prefix([row[::-1] for row in rows])
            return [len(row) - common for row in rows]
        if context is None:
            return [common_prefix(rows)] * len(rows)
        head = np.concatenate([self._bos, self._joined([*before, context], strip=True)])
        return [common_prefix([head, rows[0]])]

    def _joined(self, texts: list[str], strip: bool = False) -> Ids:
        """Ids of texts written one after another, as of one text; `strip` takes white space off it."""
        safe = len(texts) < 2 or (
            self._tokenizer.pattern == PATTERN
            and not any(STARTS_WITH_NEWLINE.match(text) or not text for text in texts[1:])
        )
        if safe and not (strip and texts[0][:1].isspace()):
            return np.concatenate([np.empty(0, np.int32), *(self._ids[text] for text in texts)])
        text = "".join(texts)
        ids, _ = self._tokenizer.encode_batch([text.strip() if strip else text], 1)
        return ids.astype(np.int32)
