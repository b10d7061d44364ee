"""CORE's prompts: the order of the examples, their shots, their texts. Pure text, in two variants.

"nanochat" is karpathy/nanochat 92d63d4, whose figures the bar 0.256525 is of. "dclm" is llm-foundry 0.9.0 as
DCLM calls it: other separators, order, draw, stripping and spans, and categories where a task has them.

A row is what is scored for one option. It is written as blocks, each tokenized as one text, and a block as
segments, so that a shot that stands in hundreds of prompts can be tokenized once.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from nanochat.evaluation.core.bundle import LANGUAGE_MODELING, MULTIPLE_CHOICE, SCHEMA, Example, Task

NANOCHAT = "nanochat"
DCLM = "dclm"
VARIANTS = (NANOCHAT, DCLM)

SHUFFLE_SEED = 1337
SHOT_SEED = 1234  # in nanochat plus the index of the example, in DCLM for all examples of a file
SEPARATORS = {NANOCHAT: "\n\n", DCLM: "\n"}

# Two prompts are of one passage where this many characters are the same, after the lines that more than so
# many, or that share, of the task's prompts have (instructions, "Answer:"; no story has over 40 of coqa's
# 7,983 turns). By it these are of 499 stories.
PASSAGE_CHARS = 100
COMMON_LINE_COUNT, COMMON_LINE_FRAC = 20, 0.05


@dataclass(frozen=True)
class Question:
    """The texts of one example, before any shots stand in front of it.

    Attributes:
        shot: what it looks like as a shot, solved, without a separator.
        blocks: of each option's row, the texts that are tokenized separately; the first follows the shots in
            one block with them (nanochat), or starts a block of its own (dclm).
        stem: nanochat's language modeling only: the row's text before the continuation; else None.
    """

    shot: str
    blocks: tuple[tuple[str, ...], ...]
    stem: str | None


def arrange(task: Task, examples: Sequence[Example], max_examples: int, variant: str) -> list[list[Example]]:
    """The examples that are asked, in groups that draw their shots from themselves.

    Args:
        task: theirs.
        examples: all of the task, in the order of the file.
        max_examples: how many to keep; 0 or less keeps all. DCLM's categories are cut evenly.
        variant: nanochat shuffles with a fixed seed and has one group; dclm keeps the order of the file and
            has one group a category.
    """
    if variant == NANOCHAT:
        shuffled = list(examples)
        random.Random(SHUFFLE_SEED).shuffle(shuffled)  # noqa: S311
        return [shuffled[:max_examples] if max_examples > 0 else shuffled]
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.category, []).append(example)
    if max_examples <= 0:
        return list(groups.values())
    share, extra = divmod(max_examples, len(groups))
    cut = [group[: share + (place < extra)] for place, group in enumerate(groups.values())]
    return [group for group in cut if group]


def draw_shots(total: int, shots: int, variant: str) -> list[list[int]]:
    """For each of `total` examples, the indices of those shown solved before it, in the order shown.

    The draw depends on `total`, so a cut list has other shots than the whole one. Where the list is too short
    to give so many, all others are shown (nanochat fails there).
    """
    count = min(shots, total - 1)
    if variant == NANOCHAT:
        return [_draw_nanochat(index, total, count) for index in range(total)]
    rng = random.Random(SHOT_SEED)  # noqa: S311
    return [_draw_dclm(index, total, count, rng) for index in range(total)]


def _draw_nanochat(index: int, total: int, count: int) -> list[int]:
    # `sample` chooses places, so drawing from a range gives what drawing from the list without `index` gives.
    rng = random.Random(SHOT_SEED + index)  # noqa: S311
    places = rng.sample(range(total - 1), count)
    return [place + (place >= index) for place in places]


def _draw_dclm(index: int, total: int, count: int, rng: random.Random) -> list[int]:
    """One generator walks through the file; the set's own order is the order of the shots."""
    drawn = set(rng.sample(range(total), count))
    drawn.discard(index)
    while len(drawn) < count:
        other = rng.choice(range(total))
        if other != index:
            drawn.add(other)
    return list(drawn)


def write(task: Task, example: Example, variant: str) -> Question:
    """The texts of an example."""
    return _write_nanochat(task, example) if variant == NANOCHAT else _write_dclm(task, example)


def _write_nanochat(task: Task, example: Example) -> Question:
    contexts = example.contexts
    if task.kind == LANGUAGE_MODELING:  # the only kind whose context is stripped
        contexts = (contexts[0].strip(),)
    rows = [context + task.delimiter + tail for context in contexts for tail in example.continuations]
    stem = (contexts[0] + task.delimiter).rstrip() if task.kind == LANGUAGE_MODELING else None
    return Question(rows[example.gold], tuple((row,) for row in rows), stem)


def _write_dclm(task: Task, example: Example) -> Question:
    contexts, tails = example.contexts, example.continuations
    if task.kind != SCHEMA:  # texts are stripped, lists of texts are not
        contexts = (contexts[0].strip(),)
    if task.kind != MULTIPLE_CHOICE:
        tails = (tails[0].strip(),)
    shot = [context + task.delimiter + tail for context in contexts for tail in tails][example.gold]
    if task.kind != SCHEMA:
        contexts = ((contexts[0] + task.delimiter).rstrip(),)
    elif task.shots:
        contexts = tuple(context + task.delimiter.rstrip() for context in contexts)
    spaced = [tail if tail.startswith(" ") else f" {tail}" for tail in tails]
    return Question(shot, tuple((context, tail) for context in contexts for tail in spaced), None)


def passages(examples: Sequence[Example]) -> list[int]:
    """For each example the number of the passage it is about; those with one number are no independent draws.

    Args:
        examples: all of a task: what is common to its prompts shows only there.
    """
    lines = [example.contexts[0].strip().split("\n") for example in examples]
    counts = Counter(line for own in lines for line in set(own))
    limit = max(COMMON_LINE_COUNT, COMMON_LINE_FRAC * len(examples))
    numbers: dict[str, int] = {}
    found = []
    for own in lines:
        rare = "\n".join(line for line in own if counts[line] <= limit) or "\n".join(own)
        found.append(numbers.setdefault(rare[:PASSAGE_CHARS], len(numbers)))
    return found
