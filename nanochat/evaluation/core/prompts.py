"""Prompts of CORE: the order of the examples, their shots, their texts. Pure text, in two variants.

"nanochat" is karpathy/nanochat 92d63d4, whose figures the bar 0.256525 is of. "dclm" is llm-foundry 0.9.0 as
DCLM calls it: other separators, order, draw, stripping and spans, and categories where a task has them.

A row is what is scored for one option. It is rendered as several texts, so that a shot that stands in
hundreds of prompts can be tokenized once.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from nanochat.evaluation.core.bundle import LANGUAGE_MODELING, SCHEMA, Example, Task

NANOCHAT = "nanochat"
DCLM = "dclm"

SHUFFLE_SEED = 1337
SHOT_SEED = 1234  # in nanochat plus the index of the example, in DCLM for all examples of a file
SEPARATORS = {NANOCHAT: "\n\n", DCLM: "\n"}

# Two prompts are of one passage where this many characters are the same, after the lines that more than so
# many, or that fraction, of the task's prompts have (instructions, "Answer:"; no story has over 40 of coqa's
# 7,983 turns). By it these are of 499 stories.
PASSAGE_CHARS = 100
COMMON_LINE_COUNT, COMMON_LINE_FRAC = 20, 0.05


@dataclass(frozen=True)
class Question:
    """The texts of one example, each tokenized by itself.

    Attributes:
        shot: what it looks like as a shot, solved, with the separator after it.
        last_shot: the same directly before a question, to which DCLM's separator belongs there.
        rows: of each option, the texts after the shots; the first of them continues the text of the
            shots (nanochat), or not (dclm).
        context: nanochat's language modeling only: the row's text before the continuation; else None.
    """

    shot: str
    last_shot: str
    rows: tuple[tuple[str, ...], ...]
    context: str | None


def arrange(examples: Sequence[Example], max_examples: int, variant: str) -> list[list[Example]]:
    """The examples that are scored, in groups that draw their shots from themselves.

    Args:
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
    each, extra = divmod(max_examples, len(groups))
    cut = [group[: each + (number < extra)] for number, group in enumerate(groups.values())]
    return [group for group in cut if group]


def draw_shots(total: int, shots: int, variant: str) -> list[list[int]]:
    """For each of `total` examples, the indices of those shown solved before it, in the order shown.

    The draw depends on `total`, so a cut list has other shots than the whole one. Where the list is too short
    to give so many, all others are shown (nanochat fails there).
    """
    count = min(shots, total - 1)
    if variant == NANOCHAT:
        # `sample` draws places: from this range it draws what it would from the list without the example.
        drawn = [random.Random(SHOT_SEED + n).sample(range(total - 1), count) for n in range(total)]  # noqa: S311
        return [[place + (place >= index) for place in places] for index, places in enumerate(drawn)]
    rng = random.Random(SHOT_SEED)  # noqa: S311
    return [_draw_dclm(index, total, count, rng) for index in range(total)]


def _draw_dclm(index: int, total: int, count: int, rng: random.Random) -> list[int]:
    """One generator walks through the file; the set's own order is the order of the shots."""
    drawn = set(rng.sample(range(total), count))
    drawn.discard(index)
    while len(drawn) < count:
        other = rng.choice(range(total))
        if other != index:
            drawn.add(other)
    return list(drawn)


def render(task: Task, example: Example, variant: str) -> Question:
    """The texts of an example."""
    is_lm, is_schema, dclm = task.kind == LANGUAGE_MODELING, task.kind == SCHEMA, variant == DCLM
    contexts, continuations = example.contexts, example.continuations
    if is_lm or (dclm and not is_schema):  # nanochat strips no other context, DCLM texts and no list of texts
        contexts = (contexts[0].strip(),)
    if dclm and (is_lm or is_schema):
        continuations = (continuations[0].strip(),)
    texts = [context + task.delimiter + end for context in contexts for end in continuations]
    shot, separator = texts[example.gold], SEPARATORS[variant]
    if not dclm:
        context = (contexts[0] + task.delimiter).rstrip() if is_lm else None
        return Question(shot + separator, shot + separator, tuple((text,) for text in texts), context)
    if not is_schema:
        contexts = ((contexts[0] + task.delimiter).rstrip(),)
    elif task.shots:
        contexts = tuple(context + task.delimiter.rstrip() for context in contexts)
    lead = separator if task.shots else ""
    ends = [end if end.startswith(" ") else f" {end}" for end in continuations]
    rows = tuple((lead + context, end) for context in contexts for end in ends)
    return Question(shot + separator, shot, rows, None)


def passages(examples: Sequence[Example]) -> list[int]:
    """For each example the number of the passage it is about; those with one number are no independent draws.

    Args:
        examples: all of a task: what is common to its prompts shows only there.
    """
    prompts = [example.contexts[0].strip().split("\n") for example in examples]
    counts = Counter(line for lines in prompts for line in set(lines))
    limit = max(COMMON_LINE_COUNT, COMMON_LINE_FRAC * len(examples))
    rare = ["\n".join(line for line in lines if counts[line] <= limit) for lines in prompts]
    numbers: dict[str, int] = {}
    return [
        numbers.setdefault((text or "\n".join(lines))[:PASSAGE_CHARS], len(numbers))
        for text, lines in zip(rare, prompts, strict=True)
    ]
