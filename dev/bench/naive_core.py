"""CORE as one would write it down first: one example, one forward pass, all logits. Nothing is shared.

The reference of the tests and the peer of `dev.bench.core`. Written from the definitions of karpathy/nanochat
92d63d4 and llm-foundry 0.9.0 (as DCLM calls it), apart from the library's own rendering, spans and batches.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from nanochat.evaluation.core.bundle import Example, Task


@dataclass(frozen=True)
class Answer:
    """What the naive scorer says about one example; `cropped` counts rows."""

    line: int
    answer: int
    losses: list[float]
    cropped: int


def answers(
    model: Any,
    tokenizer: Any,
    task: Task,
    examples: Sequence[Example],
    max_per_task: int,
    crop: int,
    variant: str = "nanochat",
) -> Iterator[Answer]:
    """Answers to all examples in the order they are asked; `model.logits` is (B, T) -> (B, T, V)."""
    for item, shots in ask(task, examples, max_per_task, variant):
        rows_of = nanochat_rows if variant == "nanochat" else dclm_rows
        rows, starts = rows_of(tokenizer, task, item, shots)
        cropped = sum(len(row) > crop for row in rows)
        starts = [max(1, start - max(0, len(row) - crop)) for row, start in zip(rows, starts, strict=True)]
        rows = [row[-crop:] for row in rows]
        losses, greedy = score(model, rows, starts, tokenizer.bos_id)
        is_lm = task.kind == "language_modeling"
        best = (0 if greedy[0] else -1) if is_lm else losses.index(min(losses))
        yield Answer(item.line, best, losses, cropped)


def ask(
    task: Task, examples: Sequence[Example], max_per_task: int, variant: str
) -> Iterator[tuple[Example, list[Example]]]:
    """Each example with its shots."""
    if variant == "nanochat":
        order = list(examples)
        random.Random(1337).shuffle(order)
        order = order[:max_per_task] if max_per_task > 0 else order
        for index, item in enumerate(order):
            others = [place for place in range(len(order)) if place != index]
            drawn = random.Random(1234 + index).sample(others, min(task.shots, len(others)))
            yield item, [order[place] for place in drawn]
        return
    categories = list(dict.fromkeys(example.category for example in examples))
    for place, category in enumerate(categories):
        group = [example for example in examples if example.category == category]
        if max_per_task > 0:
            extra = place < max_per_task % len(categories)
            group = group[: max_per_task // len(categories) + extra]
        rng = random.Random(1234)
        for index, item in enumerate(group):
            count = min(len(group) - 1, task.shots)
            drawn = set(rng.sample(range(len(group)), count))
            if index in drawn:
                drawn.remove(index)
            if len(drawn) < count:
                other = rng.choice(range(len(group)))
                while other in drawn or other == index:
                    other = rng.choice(range(len(group)))
                drawn.add(other)
            yield item, [group[place] for place in drawn]


def nanochat_rows(
    tokenizer: Any, task: Task, item: Example, shots: list[Example]
) -> tuple[list[list[int]], list[int]]:
    """Whole texts, tokenized whole; the span is what the rows do not have in common."""

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, bos=True)

    delimiter = task.delimiter
    if task.kind == "multiple_choice":
        solved = [f"{shot.contexts[0]}{delimiter}{shot.continuations[shot.gold]}\n\n" for shot in shots]
        rows = [
            encode("".join(solved) + f"{item.contexts[0]}{delimiter}{tail}") for tail in item.continuations
        ]
        common = 0
        while all(common < len(row) and row[common] == rows[0][common] for row in rows):
            common += 1
        return rows, [common] * len(rows)
    if task.kind == "schema":
        solved = [f"{shot.contexts[shot.gold]}{delimiter}{shot.continuations[0]}\n\n" for shot in shots]
        rows = [
            encode("".join(solved) + f"{head}{delimiter}{item.continuations[0]}") for head in item.contexts
        ]
        common = 0
        while all(common < len(row) and row[-1 - common] == rows[0][-1 - common] for row in rows):
            common += 1
        return rows, [len(row) - common for row in rows]
    solved = [f"{shot.contexts[0].strip()}{delimiter}{shot.continuations[0]}\n\n" for shot in shots]
    stem = "".join(solved) + f"{item.contexts[0].strip()}{delimiter}"
    before, row = encode(stem.strip()), encode(stem + item.continuations[0])
    assert row[: len(before)] == before
    return [row], [len(before)]


def dclm_rows(
    tokenizer: Any, task: Task, item: Example, shots: list[Example]
) -> tuple[list[list[int]], list[int]]:
    """Shots, context and answer tokenized apart; the span is the answer."""
    delimiter = task.delimiter
    is_schema, is_choice = task.kind == "schema", task.kind == "multiple_choice"

    def solved(shot: Example) -> str:
        head = shot.contexts[shot.gold] if is_schema else shot.contexts[0].strip()
        tail = shot.continuations[shot.gold] if is_choice else shot.continuations[0].strip()
        return f"{head}{delimiter}{tail}"

    lead = "\n" if shots else ""
    before = tokenizer.encode("\n".join(map(solved, shots)), bos=True)
    rows, starts = [], []
    for context in item.contexts:
        if is_schema:
            head = lead + context + (delimiter.rstrip() if shots else "")
        else:
            head = (lead + context.strip() + delimiter).rstrip()
        for tail in item.continuations:
            answer = tail if is_choice else tail.strip()
            answer = answer if answer.startswith(" ") else " " + answer
            context_ids = before + tokenizer.encode(head)
            rows.append(context_ids + tokenizer.encode(answer))
            starts.append(len(context_ids))
    return rows, starts


@torch.no_grad()
def score(model: Any, rows: list[list[int]], starts: list[int], pad: int) -> tuple[list[float], list[bool]]:
    """Mean loss of each span, and whether all its tokens are the likeliest."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    logits = model.logits(ids).float()
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    likeliest = logits[:, :-1].argmax(-1) == ids[:, 1:]
    found, greedy = [], []
    for place, (row, start) in enumerate(zip(rows, starts, strict=True)):
        own = losses[place, start - 1 : len(row) - 1]
        found.append(own.mean().item() if len(own) else math.nan)
        greedy.append(bool(likeliest[place, start - 1 : len(row) - 1].all()))
    return found, greedy
