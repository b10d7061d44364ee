"""CORE's prompts as tokens: every text tokenized once, kept on disk, and joined into rows.

A shot stands in front of many questions. Its ids are joined with what follows instead of being tokenized
again, wherever that gives the ids of the whole text: our pattern ends a piece after a run of newlines,
whatever follows it, unless that is another newline behind white space. Elsewhere (such a text, another
tokenizer) the whole text is tokenized.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from nanochat.common import files
from nanochat.evaluation.core import prompts
from nanochat.evaluation.core.bundle import LANGUAGE_MODELING, SCHEMA, Example, Task
from nanochat.evaluation.core.prompts import DCLM, SEPARATORS, Question
from nanochat.tokenizer.tokenizer import PATTERN

Ids = NDArray[np.int32]

# What would draw the newlines before it into its own piece.
STARTS_WITH_NEWLINE = re.compile(r"\s*[\r\n]")


class Encoder(Protocol):
    """What is asked of a tokenizer."""

    @property
    def bos_id(self) -> int:
        """Id that stands before every text."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides ids."""
        ...

    @property
    def pattern(self) -> str:
        """The regex that splits text into pieces."""
        ...

    def encode_batch(
        self, texts: Sequence[str], num_threads: int | None = None
    ) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Ids of all texts end to end, and (texts + 1,) offsets."""
        ...


@dataclass(frozen=True)
class Row:
    """One sequence to be scored.

    Attributes:
        ids: tokens, (T,) int32; BOS first, unless it was cropped with the beginning.
        start: first scored token, at least 1.
        end: one after the last scored token; equal to `start` where nothing is scored.
        cropped: whether tokens were cut off at the left.
    """

    ids: Ids
    start: int
    end: int
    cropped: bool


@dataclass(frozen=True)
class _Places:
    """Where the texts of one question are among all texts of its group."""

    shot: int  # with a separator after it
    last_shot: int  # as it stands directly before a question
    blocks: tuple[tuple[int, ...], ...]
    stem: int | None


class Prompts:
    """The prompts of one group of examples, as token rows."""

    def __init__(
        self, tokenizer: Encoder, task: Task, examples: Sequence[Example], variant: str, *, keep: bool
    ) -> None:
        """Write all texts and tokenize them, or read their ids from the disk.

        Args:
            tokenizer: the model's.
            task: theirs.
            examples: a group of core_prompts.arrange.
            variant: one of core_prompts.VARIANTS.
            keep: write the ids to the disk, on one rank; `unkept` says why it could not be done.
        """
        # A lone example has no shots, and DCLM writes no separator where there is no shot before it.
        task = dataclasses.replace(task, shots=min(task.shots, len(examples) - 1))
        self.task, self.variant = task, variant
        self._tokenizer = tokenizer
        started = time.perf_counter()
        questions = [prompts.write(task, example, variant) for example in examples]
        self._texts, self._places = _collect(questions, variant, bool(task.shots))
        self._shots = prompts.draw_shots(len(examples), task.shots, variant)
        rendered = time.perf_counter()
        self._ids, self._offsets, self.unkept = encode_kept(tokenizer, self._texts, keep)
        self.rendering_s = rendered - started
        self.tokenizing_s = time.perf_counter() - rendered
        self._joins = tokenizer.pattern == PATTERN
        self._bos = np.array([tokenizer.bos_id], np.int32)

    def tokens(self, index: int) -> int:
        """About how many tokens a forward pass over an example takes: its shots and its longest row."""
        sizes = np.diff(self._offsets)
        places = self._places[index]
        shots = sum(int(sizes[self._places[shot].shot]) for shot in self._shots[index])
        return shots + max(sum(int(sizes[place]) for place in block) for block in places.blocks)

    def rows(self, index: int, crop_tokens: int | None) -> list[Row]:
        """Tokens and spans of one example's options, whole, or cut to their last `crop_tokens` tokens."""
        places, shots = self._places[index], self._shots[index]
        before = [self._places[shot].shot for shot in shots[:-1]]
        before += [self._places[shot].last_shot for shot in shots[-1:]]
        if self.variant == DCLM:
            head = [self._bos, self._joined(before)]
            rows = [np.concatenate([*head, *(self._of(part) for part in block)]) for block in places.blocks]
            starts = [
                len(row) - len(self._of(block[-1])) for row, block in zip(rows, places.blocks, strict=True)
            ]
        else:
            rows = [np.concatenate([self._bos, self._joined([*before, block[0]])]) for block in places.blocks]
            starts = self._nanochat_starts(rows, before, places.stem)
        return [_crop(row, start, crop_tokens) for row, start in zip(rows, starts, strict=True)]

    def _nanochat_starts(self, rows: list[Ids], before: list[int], stem: int | None) -> list[int]:
        if self.task.kind == SCHEMA:
            common = common_prefix([row[::-1] for row in rows])
            return [len(row) - common for row in rows]
        if self.task.kind != LANGUAGE_MODELING:
            return [common_prefix(rows)] * len(rows)
        assert stem is not None
        head = np.concatenate([self._bos, self._joined([*before, stem], strip=True)])
        return [common_prefix([head, rows[0]])]

    def _of(self, place: int) -> Ids:
        return self._ids[self._offsets[place] : self._offsets[place + 1]].astype(np.int32)

    def _joined(self, places: list[int], strip: bool = False) -> Ids:
        """Ids of the texts written one after another, as of one text; `strip` takes white space off it."""
        texts = [self._texts[place] for place in places]
        safe = len(texts) < 2 or (
            self._joins and not any(STARTS_WITH_NEWLINE.match(text) or not text for text in texts[1:])
        )
        if safe and not (strip and texts[0][:1].isspace()):
            return np.concatenate([self._of(place) for place in places] or [np.empty(0, np.int32)])
        whole = "".join(texts)
        ids, _ = self._tokenizer.encode_batch([whole.strip() if strip else whole], 1)
        return ids.astype(np.int32)


def _collect(
    questions: Sequence[Question], variant: str, with_shots: bool
) -> tuple[list[str], list[_Places]]:
    """All texts that are to be tokenized, each once, and where each question has its own."""
    numbers: dict[str, int] = {}
    separator = SEPARATORS[variant]

    def place(text: str) -> int:
        return numbers.setdefault(text, len(numbers))

    places = []
    for question in questions:
        shot = place(question.shot + separator) if with_shots else -1
        last, lead = shot, ""
        if variant == DCLM and with_shots:  # the separator belongs to the question, not to the shot before it
            last, lead = place(question.shot), separator
        blocks = tuple((place(lead + first), *map(place, rest)) for first, *rest in question.blocks)
        stem = None if question.stem is None else place(question.stem)
        places.append(_Places(shot, last, blocks, stem))
    return list(numbers), places


def encode_kept(
    tokenizer: Encoder, texts: Sequence[str], keep: bool
) -> tuple[NDArray[Any], NDArray[np.int64], str]:
    """Ids and offsets of texts, from the disk where they have been tokenized before.

    Args:
        tokenizer: whose ids.
        texts: what to tokenize.
        keep: write them to the disk if they were not there.

    Returns:
        The ids, the offsets, and why they were not kept: a full disk costs the next evaluation some time,
        and this one nothing. Empty where nothing went wrong.
    """
    path = _cache_file(tokenizer, texts)
    if (found := _read_kept(path)) is not None:
        return *found, ""
    ids, offsets = tokenizer.encode_batch(texts)
    if int(ids.max(initial=0)) < 1 << 16:
        ids = ids.astype(np.uint16)
    try:
        if keep:
            _keep(path, ids, offsets)
    except OSError as error:
        return ids, offsets, f"{path}: {error.strerror or error}"
    return ids, offsets, ""


def _cache_file(tokenizer: Encoder, texts: Sequence[str]) -> Path:
    """Where the ids of these texts are kept."""
    digest = hashlib.sha256(tokenizer.fingerprint.encode())
    for text in texts:
        # Each behind its length, so that no two lists of texts give the same bytes.
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return files.token_cache_file(digest.hexdigest())


def _read_kept(path: Path) -> tuple[NDArray[Any], NDArray[np.int64]] | None:
    """Ids and offsets that were kept; None where there are none, or damaged ones, which are made again."""
    try:
        found = safetensors.numpy.load_file(path)
        ids, offsets = found["ids"], found["offsets"]
        return (ids, offsets) if _checksum(ids, offsets) == bytes(found["sha256"]) else None
    except (SafetensorError, OSError, KeyError):
        return None


def _keep(path: Path, ids: NDArray[Any], offsets: NDArray[np.int64]) -> None:
    checksum = np.frombuffer(_checksum(ids, offsets), np.uint8)
    files.atomic_write(path, safetensors.numpy.save({"ids": ids, "offsets": offsets, "sha256": checksum}))


def _checksum(ids: NDArray[Any], offsets: NDArray[np.int64]) -> bytes:
    return hashlib.sha256(ids.tobytes() + offsets.tobytes()).digest()


def common_prefix(rows: Sequence[NDArray[Any]]) -> int:
    """Number of tokens that all rows begin with."""
    shortest = min(len(row) for row in rows)
    differs = np.zeros(shortest, dtype=bool)
    for row in rows[1:]:
        differs |= row[:shortest] != rows[0][:shortest]
    return int(differs.argmax()) if differs.any() else shortest


def _crop(ids: Ids, start: int, crop_tokens: int | None) -> Row:
    """Keep the last `crop_tokens` tokens. The first token kept has no past, so it is never scored."""
    cut = 0 if crop_tokens is None else max(0, len(ids) - crop_tokens)
    return Row(ids[cut:], max(1, start - cut), len(ids) - cut, cut > 0)
