"""CORE: find the bundle, tokenize the prompts, score every option in batches.

An option's loss is the mean negative log-likelihood (nats per token) of its span. Multiple choice and schema
tasks take the option of least loss; a language modeling task counts only if every token of the continuation
is the likeliest. Rows of many examples are sorted by length and scored together, and the output head sees
only the scored positions. Spans, ties and corner cases are those of karpathy/nanochat 92d63d4.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanochat import core_mini, core_tasks, files, loss
from nanochat.core_results import CoreResult, Prediction, TaskScore, choose
from nanochat.core_tasks import Bundle, Example, Task
from nanochat.errors import UserError
from nanochat.gpt import GPT
from nanochat.tokenizer import Tokenizer
from nanochat.world import World

# Examples rendered and tokenized at a time: enough to sort by length, and at most 60 MB of ids (4 options of
# 1,700 tokens each in the longest task).
WINDOW_EXAMPLES = 1024


@dataclass(frozen=True)
class Row:
    """One sequence to be scored.

    Attributes:
        ids: tokens, (T,) int64, BOS first unless cropped.
        start: first scored token, at least 1.
        end: one after the last scored token; equal to `start` where nothing is scored.
        cropped: whether tokens were cut off at the left.
    """

    ids: np.ndarray
    start: int
    end: int
    cropped: bool


def find_bundle(where: str) -> Bundle:
    """The bundle a person asked for: a path, "mini" for the small suite, "" for the base directory's.

    Raises:
        UserError: there is none.
    """
    if where == "mini":
        return Bundle.from_texts("core_mini", core_mini.build())
    if where:
        return core_tasks.open_bundle(Path(where).expanduser())
    folder = files.eval_bundle_dir()
    if not (folder / "core.yaml").is_file():
        raise UserError(
            f"{folder}: there is no eval bundle. Give one with --eval-bundle PATH (a folder or a zip), "
            "or --eval-bundle mini for the small suite."
        )
    return core_tasks.open_bundle(folder)


def evaluate(
    model: GPT,
    tokenizer: Tokenizer,
    bundle: Bundle,
    *,
    max_per_task: int = 0,
    world: World,
    batch_tokens: int = 16384,
    crop_tokens: int | None = None,
    on_task: Callable[[TaskScore], None] | None = None,
) -> CoreResult:
    """Score all tasks of a bundle.

    Args:
        model: on `world.device`; the same weights on every rank.
        tokenizer: the model's.
        bundle: from `find_bundle`.
        max_per_task: examples of each task, drawn with the fixed seed; 0 means all.
        world: the examples are split over its ranks; all ranks return the same result.
        batch_tokens: most tokens, padding included, in a forward pass of several rows.
        crop_tokens: longer prompts lose their beginning, and are counted; None means the model's context.
        on_task: called on every rank with each task's score as soon as it is known.

    Raises:
        UserError: the bundle is faulty; every file is checked before the first is scored.
    """
    crop_tokens = model.config.sequence_len if crop_tokens is None else crop_tokens
    started = time.perf_counter()
    tasks = core_tasks.load_tasks(bundle)
    suite = [(task, core_tasks.load_examples(bundle, task)) for task in tasks]
    scores: list[TaskScore] = []
    predictions: list[Prediction] = []
    for task, examples in suite:
        chosen = core_tasks.arrange(examples, max_per_task)
        answers = _evaluate_task(model, tokenizer, task, chosen, world, batch_tokens, crop_tokens)
        scores.append(_score(task, answers))
        predictions.extend(answers)
        if on_task is not None:
            on_task(scores[-1])
    seconds = time.perf_counter() - started
    return CoreResult(bundle.name, tuple(scores), tuple(predictions), crop_tokens, seconds)


def _score(task: Task, answers: Sequence[Prediction]) -> TaskScore:
    correct = sum(prediction.answer == prediction.gold for prediction in answers)
    cropped = sum(prediction.cropped for prediction in answers)
    return TaskScore(
        task.label,
        task.kind,
        task.shots,
        task.baseline_percent,
        len(answers),
        correct,
        cropped_prompts=cropped,
    )


def _evaluate_task(
    model: GPT,
    tokenizer: Tokenizer,
    task: Task,
    examples: Sequence[Example],
    world: World,
    batch_tokens: int,
    crop_tokens: int,
) -> list[Prediction]:
    """Answers to all examples of a task, the same on every rank."""
    widest = max(max(len(example.contexts), len(example.continuations)) for example in examples)
    # One line an example: answer, cropped rows, losses. Each rank fills its lines; their sum is the table.
    table = torch.zeros(len(examples), 2 + widest, dtype=torch.float32)
    mine = range(world.rank, len(examples), world.size)
    for first in range(0, len(mine), WINDOW_EXAMPLES):
        window = mine[first : first + WINDOW_EXAMPLES]
        rows = [row_set(tokenizer, task, examples, index, crop_tokens) for index in window]
        scored = iter(_score_rows(model, [row for group in rows for row in group], batch_tokens))
        for index, group in zip(window, rows, strict=True):
            losses, greedy = zip(*(next(scored) for _ in group), strict=True)
            answer = choose(losses) if task.kind != core_tasks.LANGUAGE_MODELING else (0 if greedy[0] else -1)
            line = [answer, sum(row.cropped for row in group), *losses]
            table[index, : len(line)] = torch.tensor(line)
    filled = world.all_reduce_sum(table.to(world.device)).tolist()
    return [
        Prediction(
            task.label,
            index,
            example.line,
            tuple(line[2 : 2 + len(example.contexts) * len(example.continuations)]),
            int(line[0]),
            example.gold,
            int(line[1]),
        )
        for index, (example, line) in enumerate(zip(examples, filled, strict=True))
    ]


def row_set(
    tokenizer: Tokenizer, task: Task, examples: Sequence[Example], index: int, crop_tokens: int
) -> list[Row]:
    """Tokens and spans of one example's options, cut to the last `crop_tokens` tokens."""
    places = core_tasks.draw_shots(index, len(examples), task.shots)
    prompt = core_tasks.render(task, examples[index], [examples[place] for place in places])
    texts = list(prompt.rows) if prompt.stem is None else [prompt.stem, *prompt.rows]
    ids, offsets = tokenizer.encode_batch(texts, num_threads=1)
    bos = np.array([tokenizer.bos_id])
    rows = [
        np.concatenate([bos, ids[a:b].astype(np.int64)])
        for a, b in zip(offsets[:-1], offsets[1:], strict=True)
    ]
    if task.kind == core_tasks.SCHEMA:
        common = _common_prefix([row[::-1] for row in rows])
        starts = [len(row) - common for row in rows]
    else:
        # Language modeling: the stem and the row begin alike, and what follows the stem is scored.
        starts = [_common_prefix(rows)] * len(rows)
    if prompt.stem is not None:
        rows, starts = rows[1:], starts[1:]
    return [_crop(row, start, crop_tokens) for row, start in zip(rows, starts, strict=True)]


def _common_prefix(rows: Sequence[np.ndarray]) -> int:
    """Number of tokens that all rows begin with."""
    shortest = min(len(row) for row in rows)
    differs = np.zeros(shortest, dtype=bool)
    for row in rows[1:]:
        differs |= row[:shortest] != rows[0][:shortest]
    return int(differs.argmax()) if differs.any() else shortest


def _crop(ids: np.ndarray, start: int, crop_tokens: int) -> Row:
    """Keep the last `crop_tokens` tokens. The first token kept has no past, so it is never scored."""
    cut = max(0, len(ids) - crop_tokens)
    return Row(ids[cut:], max(1, start - cut), len(ids) - cut, cut > 0)


def _score_rows(model: GPT, rows: Sequence[Row], batch_tokens: int) -> list[tuple[float, bool]]:
    """Mean loss and "every token is the likeliest" of each row, in the order given."""
    # Options with the same tokens are scored once, so that they tie exactly whatever batch they fall in.
    keys = [(row.ids.tobytes(), row.start) for row in rows]
    distinct = list(dict(zip(keys, rows, strict=True)).items())
    results: dict[tuple[bytes, int], tuple[float, bool]] = {}
    for batch in _batches([len(row.ids) for _, row in distinct], batch_tokens):
        scored = score_batch(model, [distinct[place][1] for place in batch])
        for place, result in zip(batch, scored, strict=True):
            results[distinct[place][0]] = result
    return [results[key] for key in keys]


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in groups of similar length, longest first, each group at most `batch_tokens` when padded."""
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


@torch.no_grad()
def score_batch(model: GPT, rows: Sequence[Row]) -> list[tuple[float, bool]]:
    """Score rows in one forward pass, padded at the right, where a causal model cannot see it."""
    device = model.head.weight.device
    longest = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    for place, row in enumerate(rows):
        ids[place, : len(row.ids)] = torch.from_numpy(row.ids)
    # The hidden state before a token predicts it, so the last token of a row is only ever a target.
    batch = torch.cat([torch.full((row.end - row.start,), place) for place, row in enumerate(rows)])
    position = torch.cat([torch.arange(row.start, row.end) for row in rows])
    targets = ids[batch, position]
    hidden: Tensor = model(ids[:, :-1].to(device))
    losses, likeliest = loss.token_losses(
        hidden[batch.to(device), (position - 1).to(device)],
        model.head.weight,
        targets.to(device),
        model.config.constants.softcap,
        vocab_size=model.config.vocab_size,
        with_argmax=True,
    )
    spans = [row.end - row.start for row in rows]
    pairs = zip(torch.split(losses.float().cpu(), spans), torch.split(likeliest.cpu(), spans), strict=True)
    return [(nats.mean().item(), bool(hits.all())) for nats, hits in pairs]
