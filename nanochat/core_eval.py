"""CORE: find the bundle, score every option, and say what was found.

An option's loss is the mean negative log-likelihood (nats per token) of its span. Multiple choice and schema
tasks take the option of least loss; a language modeling task counts only if every token of the continuation
is the likeliest. What options share is computed once (core_batches), and the output head sees only the scored
positions. Spans, ties and corner cases are those of the variant (core_prompts).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from nanochat import core_batches, core_mini, core_prompts, core_tasks, files, loss
from nanochat.core_batches import Family, Inputs, Span
from nanochat.core_prompts import DCLM, NANOCHAT
from nanochat.core_results import CoreResult, Prediction, TaskScore, choose, score_task
from nanochat.core_tasks import Bundle, Example, Task
from nanochat.core_tokens import Encoder, Prompts
from nanochat.engine import KVCache
from nanochat.errors import UserError
from nanochat.gpt import GPT
from nanochat.world import World

# Examples whose rows are made at a time: at most 60 MB of ids (4 options of 3,800 tokens each).
WINDOW_EXAMPLES = 1024
# A forward pass costs its tokens and this many more. CPU: 2 ms at depth 4, 20,000 tokens/s. Others: launches.
OVERHEAD_TOKENS = {"cpu": 48}
LAUNCH_TOKENS = 8192


class Scorer(Protocol):
    """A causal language model, as CORE uses it."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        ...

    @property
    def context_tokens(self) -> int:
        """Length it was trained for."""
        ...

    def reserve(self, tokens: int) -> None:
        """Make room for rows of so many tokens."""
        ...

    def read(self, ids: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, C): what `losses` takes."""
        ...

    def read_on(self, shared: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        """Outputs of ids (R, T) that follow shared (F, L): row i goes on from shared[rows[i]]."""
        ...

    def losses(self, hidden: Tensor, targets: Tensor, with_argmax: bool) -> tuple[Tensor, Tensor]:
        """(N, C), (N,) -> losses in nats and, if asked, whether the target is the likeliest token."""
        ...


@dataclass(frozen=True)
class GPTScorer:
    """Our own model as a Scorer."""

    model: GPT

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.model.head.weight.device

    @property
    def context_tokens(self) -> int:
        """Length it was trained for."""
        return self.model.config.sequence_len

    def reserve(self, tokens: int) -> None:
        """Make the rotary tables long enough."""
        if tokens > self.context_tokens:
            self.model.reserve_positions(tokens)

    def read(self, ids: Tensor) -> Tensor:
        """Hidden states after the final norm."""
        hidden: Tensor = self.model(ids)
        return hidden

    def read_on(self, shared: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        """Hidden states of rows behind a cache."""
        families, length = shared.shape
        cache = KVCache(
            self.model.config, families, length + ids.size(1), dtype=self.model.dtype, device=self.device
        )
        self.model(shared, cache)
        cache.take_rows(rows)
        hidden: Tensor = self.model(ids, cache)
        return hidden

    def losses(self, hidden: Tensor, targets: Tensor, with_argmax: bool) -> tuple[Tensor, Tensor]:
        """Losses of the softcapped head."""
        config = self.model.config
        return loss.token_losses(
            hidden,
            self.model.head.weight,
            targets,
            config.constants.softcap,
            vocab_size=config.vocab_size,
            with_argmax=with_argmax,
        )


@dataclass
class Clock:
    """Where the seconds of an evaluation went, on this rank."""

    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(
            ("reading", "rendering", "tokenizing", "batching", "forward", "scoring"), 0.0
        )
    )
    tokens: int = 0  # positions computed, padding included
    rows: int = 0  # options scored

    def add(self, part: str, since: float) -> float:
        """Count the time since `since` for a part; returns now."""
        now = time.perf_counter()
        self.seconds[part] += now - since
        return now


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
    model: Scorer,
    tokenizer: Encoder,
    bundle: Bundle,
    *,
    max_per_task: int = 0,
    world: World,
    variant: str = NANOCHAT,
    batch_tokens: int = 16384,
    crop_tokens: int | None = None,
    keep_going: bool = False,
    on_task: Callable[[TaskScore], None] | None = None,
) -> CoreResult:
    """Score all tasks of a bundle.

    Args:
        model: on `world.device`; the same weights on every rank.
        tokenizer: the model's.
        bundle: from `find_bundle`.
        max_per_task: examples of each task, drawn with the fixed seed; 0 means all.
        world: the examples are split over its ranks; all ranks return the same result.
        variant: one of core_prompts.VARIANTS.
        batch_tokens: most positions in a forward pass of several rows, padding included.
        crop_tokens: longer prompts lose their beginning, and are counted; None means the model's context.
        keep_going: leave out tasks whose file is faulty; then there is no CORE.
        on_task: called on every rank with each task's score as soon as it is known.

    Raises:
        UserError: the bundle is faulty; every file is checked before the first is scored.
    """
    crop_tokens = model.context_tokens if crop_tokens is None else crop_tokens
    if crop_tokens < 2:
        raise UserError(f"--core-crop-tokens={crop_tokens}: expected 2 or more, a token and what follows it.")
    model.reserve(crop_tokens)
    clock, started = Clock(), time.perf_counter()
    suite, faults = _load_suite(bundle, keep_going)
    clock.add("reading", started)
    scores: list[TaskScore] = []
    predictions: list[Prediction] = []
    for task, examples in suite:
        job = _Job(model, tokenizer, task, variant, batch_tokens, crop_tokens, clock)
        answers = job.run(examples, max_per_task, world)
        about = (task.label, task.kind, task.shots, task.baseline_percent)
        scores.append(score_task(*about, answers, _controls_of(examples, answers)))
        predictions.extend(answers)
        if on_task is not None:
            on_task(scores[-1])
    return CoreResult(
        bundle=bundle.name,
        variant=variant,
        tasks=tuple(scores),
        predictions=tuple(predictions),
        crop_tokens=crop_tokens,
        seconds=time.perf_counter() - started,
        seconds_of=dict(clock.seconds),
        computed_tokens=int(world.all_reduce_sum(torch.tensor(clock.tokens, device=world.device))),
        faults=faults,
    )


def _controls_of(examples: Sequence[Example], answers: Sequence[Prediction]) -> dict[str, float]:
    """The controls on the examples that were asked."""
    asked = {answer.line for answer in answers}
    return core_tasks.controls([example for example in examples if example.line in asked])


def _load_suite(bundle: Bundle, keep_going: bool) -> tuple[list[tuple[Task, list[Example]]], dict[str, str]]:
    """All tasks with their examples, and what is wrong with those that are left out."""
    suite: list[tuple[Task, list[Example]]] = []
    faults: dict[str, str] = {}
    for task in core_tasks.load_tasks(bundle):
        try:
            suite.append((task, core_tasks.load_examples(bundle, task)))
        except UserError as error:
            if not keep_going:
                raise
            faults[task.label] = str(error)
    if not suite:
        raise UserError(f"{bundle.name}: every task is faulty; the first: {next(iter(faults.values()))}")
    return suite, faults


@dataclass(frozen=True)
class _Job:
    """One task being scored."""

    model: Scorer
    tokenizer: Encoder
    task: Task
    variant: str
    batch_tokens: int
    crop_tokens: int
    clock: Clock

    def run(self, examples: Sequence[Example], max_examples: int, world: World) -> list[Prediction]:
        """Answers to all examples, the same on every rank."""
        started = time.perf_counter()
        passage_of = dict(
            zip((example.line for example in examples), core_prompts.passages(examples), strict=True)
        )
        groups = core_prompts.arrange(self.task, examples, max_examples, self.variant)
        self.clock.add("rendering", started)
        answers: list[Prediction] = []
        for group in groups:
            passages = [passage_of[example.line] for example in group]
            answers.extend(self._run_group(group, passages, len(answers), world))
        return answers

    def _run_group(
        self, group: Sequence[Example], passages: Sequence[int], first_index: int, world: World
    ) -> list[Prediction]:
        prompts = Prompts(self.tokenizer, self.task, group, self.variant, keep=world.is_main)
        self.clock.seconds["rendering"] += prompts.rendering_s
        self.clock.seconds["tokenizing"] += prompts.tokenizing_s
        # A line an example: answer, cropped rows, losses. Each rank fills its lines; their sum is the table.
        table = torch.zeros(len(group), 2 + max(example.options for example in group), dtype=torch.float32)
        for window in self._windows(prompts, passages, world):
            started = time.perf_counter()
            rows = [prompts.rows(index, self.crop_tokens) for index in window]
            self.clock.add("tokenizing", started)
            spans = [Span(row.ids, row.start, row.end) for own in rows for row in own]
            found = iter(self._score(spans))
            for index, own in zip(window, rows, strict=True):
                losses, greedy = zip(*(next(found) for _ in own), strict=True)
                is_choice = self.task.kind != core_tasks.LANGUAGE_MODELING
                answer = choose(losses) if is_choice else (0 if greedy[0] else -1)
                line = [answer, sum(row.cropped for row in own), *losses]
                table[index, : len(line)] = torch.tensor(line)
        filled = world.all_reduce_sum(table.to(world.device)).tolist()
        return [
            Prediction(
                task=self.task.label,
                index=first_index + index,
                line=example.line,
                losses=tuple(line[2 : 2 + example.options]),
                answer=int(line[0]),
                gold=example.gold,
                cropped=int(line[1]),
                passage=passages[index],
                category=example.category if self.variant == DCLM else "",
            )
            for index, (example, line) in enumerate(zip(group, filled, strict=True))
        ]

    def _windows(self, prompts: Prompts, passages: Sequence[int], world: World) -> Iterator[list[int]]:
        """This rank's examples, some at a time: those of one passage together, where they can share it."""
        costs = [prompts.tokens(index) for index in range(len(passages))]
        units = range(len(passages)) if self.task.shots else passages
        homes = core_batches.share_out(costs, units, world.size)
        longest = dict.fromkeys(units, 0)
        for unit, cost in zip(units, costs, strict=True):
            longest[unit] = max(longest[unit], cost)
        mine = [index for index, home in enumerate(homes) if home == world.rank]
        mine.sort(key=lambda index: (-longest[units[index]], units[index], index))
        for first in range(0, len(mine), WINDOW_EXAMPLES):
            yield mine[first : first + WINDOW_EXAMPLES]

    def _score(self, spans: Sequence[Span]) -> list[tuple[float, bool]]:
        """Mean loss and "every token is the likeliest" of each span, in the order given."""
        started = time.perf_counter()
        # Options with the same tokens are scored once, so that they tie exactly whatever batch they fall in.
        keys = [(span.ids.tobytes(), span.start) for span in spans]
        distinct = {key: span for key, span in zip(keys, spans, strict=True) if span.end > span.start}
        inputs = Inputs.of(list(distinct.values()))
        wanted: list[list[int]] = [[] for _ in inputs.ids]
        for place, number in enumerate(inputs.of_span):
            wanted[number].append(place)
        overhead = OVERHEAD_TOKENS.get(self.model.device.type, LAUNCH_TOKENS)
        found = core_batches.families(inputs, overhead, self.batch_tokens)
        plan = core_batches.batches(found, overhead, self.batch_tokens)
        self.clock.add("batching", started)
        asked = list(distinct.values())
        scored: list[tuple[float, bool]] = [(0.0, False)] * len(asked)
        for batch in plan:
            places = [place for family in batch for number in family.inputs for place in wanted[number]]
            rows = [number for family in batch for number in family.inputs for _ in wanted[number]]
            results = self._score_batch(inputs, batch, rows, [asked[place] for place in places])
            for place, result in zip(places, results, strict=True):
                scored[place] = result
        by_key = dict(zip(distinct, scored, strict=True))
        return [by_key.get(key, (float("nan"), True)) for key in keys]

    @torch.no_grad()
    def _score_batch(
        self, inputs: Inputs, batch: Sequence[Family], numbers: Sequence[int], spans: Sequence[Span]
    ) -> list[tuple[float, bool]]:
        """Score spans; numbers[i] is the sequence of inputs that span i is read from."""
        started = time.perf_counter()
        device = self.model.device
        shared = min(family.shared for family in batch)
        order = [number for family in batch for number in family.inputs]
        tails = _padded([inputs.ids[number][shared:] for number in order])
        self.clock.rows += len(spans)
        self.clock.tokens += tails.numel() + shared * len(batch)
        if shared:
            heads = torch.from_numpy(
                np.stack([inputs.ids[family.inputs[0]][:shared] for family in batch]).astype(np.int64)
            )
            owners = torch.tensor([place for place, family in enumerate(batch) for _ in family.inputs])
            hidden = self.model.read_on(heads.to(device), owners.to(device), tails.to(device))
        else:
            hidden = self.model.read(tails.to(device))
        # The output at a token predicts the next one.
        row_of = {number: row for row, number in enumerate(order)}
        sizes = [span.end - span.start for span in spans]
        row = np.repeat([row_of[number] for number in numbers], sizes)
        position = np.concatenate([np.arange(span.start - 1, span.end - 1) for span in spans]) - shared
        targets = np.concatenate([span.ids[span.start : span.end] for span in spans]).astype(np.int64)
        picked = hidden[torch.from_numpy(row).to(device), torch.from_numpy(position).to(device)]
        started = self.clock.add("forward", started)
        losses, hits = self.model.losses(
            picked,
            torch.from_numpy(targets).to(device),
            with_argmax=self.task.kind == core_tasks.LANGUAGE_MODELING,
        )
        nats, likeliest = losses.float().cpu(), hits.cpu()
        results = [
            (part.mean().item(), bool(hit.all()))
            for part, hit in zip(torch.split(nats, sizes), torch.split(likeliest, sizes), strict=True)
        ]
        self.clock.add("scoring", started)
        return results


def _padded(rows: Sequence[np.ndarray]) -> Tensor:
    """Rows of different lengths as (B, T) int64, zeros at the right, where a causal model cannot see them."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.from_numpy(row)
    return ids
