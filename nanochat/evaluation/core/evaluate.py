"""CORE evaluation: finds the bundle, scores every option of every example, and gathers the ranks' answers.

An option's loss is the mean negative log-likelihood (nats per token) of its span. Multiple choice and schema
tasks take the option of least loss; a language modeling task counts only if every token of the continuation
is the likeliest. Spans, ties and corner cases are those of the variant (prompts).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nanochat.common import files
from nanochat.common.errors import UserError
from nanochat.common.stop_signals import Stopped
from nanochat.distributed.world import World
from nanochat.evaluation.core import batching, prompts
from nanochat.evaluation.core import bundle as core_bundle
from nanochat.evaluation.core.bundle import Bundle, Example, Task
from nanochat.evaluation.core.prompt_tokens import Encoder, Prompts
from nanochat.evaluation.core.prompts import DCLM, NANOCHAT
from nanochat.evaluation.core.results import CoreResult, Prediction, TaskScore, choose, score_task
from nanochat.evaluation.core.scoring import Clock, Scorer, score_spans

# Examples whose rows are made at a time: at most 60 MB of ids (4 options of 3,800 tokens each).
WINDOW_EXAMPLES = 1024
MINI = Path(__file__).parent / "core_mini"  # made by dev/mini_bundle.py


def find_bundle(where: str) -> Bundle:
    """The bundle that --eval-bundle names: a path, "mini" for the small suite, "" for the base directory's.

    Raises:
        UserError: there is none.
    """
    if where == "mini":
        return core_bundle.open_bundle(MINI)
    if where:
        return core_bundle.open_bundle(Path(where).expanduser())
    folder = files.eval_bundle_dir()
    if not (folder / "core.yaml").is_file():
        raise UserError(
            f"{folder}: there is no eval bundle. Fetch it: python -m scripts.core_download. Or "
            "give one with --eval-bundle PATH (a folder or a zip), or --eval-bundle mini for the small suite."
        )
    return core_bundle.open_bundle(folder)


def evaluate(
    model: Scorer,
    tokenizer: Encoder,
    bundle: Bundle,
    *,
    max_per_task: int = 0,
    world: World,
    variant: str = NANOCHAT,
    batch_tokens: int = 32768,
    crop_tokens: int | None = None,
    keep_going: bool = False,
    on_task: Callable[[TaskScore], None] = lambda _: None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> CoreResult:
    """Score all tasks of a bundle.

    Args:
        model: on `world.device`; the same weights on every rank.
        tokenizer: the model's.
        bundle: from `find_bundle`.
        max_per_task: examples of each task, drawn with the fixed seed; 0 means all.
        world: the examples are split over its ranks; all ranks return the same result.
        variant: a key of prompts.SEPARATORS.
        batch_tokens: most positions in a forward pass of several rows, padding included.
        crop_tokens: longer prompts lose their beginning; by default those that the model cannot read.
        keep_going: leave out tasks whose file is faulty; then there is no CORE.
        on_task: called on every rank with each task's score as soon as it is known.
        stop_requested: called now and then; if it is True on any rank, all of them raise `Stopped`.

    Raises:
        UserError: a faulty bundle, all of which is checked first.
    """
    started = time.perf_counter()
    crop = _crop_of(model, variant, crop_tokens)
    run = _Evaluation(model, tokenizer, variant, batch_tokens, crop, world, stop_requested)
    suite, faults = _load_suite(bundle, keep_going)
    run.clock.add("reading", started)
    scores, predictions = list[TaskScore](), list[Prediction]()
    for task, examples, digest in suite:
        answers = run.answers(task, examples, max_per_task)
        scores.append(score_task(task, digest, examples, answers))
        predictions.extend(answers)
        on_task(scores[-1])
    counts = torch.tensor([run.clock.tokens, run.clock.outputs], device=world.device)
    computed, scored = world.all_reduce_sum(counts).tolist()
    cropped = crop_tokens is not None or any(score.cropped_prompts for score in scores)
    return CoreResult(
        bundle=bundle.name,
        variant=variant,
        tasks=tuple(scores),
        predictions=tuple(predictions),
        context_tokens=model.context_tokens,
        crop_tokens=crop if cropped else None,
        seconds=time.perf_counter() - started,
        seconds_of=run.clock.seconds,
        computed_tokens=computed,
        scored_tokens=scored,
        faults=faults,
    )


def _crop_of(model: Scorer, variant: str, requested: int | None) -> int:
    """How many tokens are left of longer prompts.

    By default karpathy/nanochat's prompts to our own models are whole, as there, as far as rotary tables go:
    to end on one longer prompt would lose the scores of all the others. Other prompts have the context.
    """
    if requested is None:
        return model.longest_tokens if variant == NANOCHAT else model.context_tokens
    if not 2 <= requested <= model.longest_tokens:
        raise UserError(
            f"--core-crop-tokens={requested}: expected 2 (a token and what follows it) to "
            f"{model.longest_tokens}, which this model can read. Or leave it out."
        )
    return requested


def _load_suite(
    bundle: Bundle, keep_going: bool
) -> tuple[list[tuple[Task, list[Example], str]], dict[str, str]]:
    """All tasks with their examples and the digest of their file, and what is wrong with those left out."""
    suite: list[tuple[Task, list[Example], str]] = []
    faults: dict[str, str] = {}
    for task in core_bundle.load_tasks(bundle):
        try:
            suite.append((task, core_bundle.load_examples(bundle, task), bundle.sha256(task.member)))
        except UserError as error:
            if not keep_going:
                raise
            faults[task.label] = str(error)
    if not suite:
        raise UserError(f"{bundle.name}: every task is faulty; the first: {next(iter(faults.values()))}")
    return suite, faults


@dataclass
class _Evaluation:
    """One evaluation on one rank: how it scores, and what it counts."""

    model: Scorer
    tokenizer: Encoder
    variant: str
    batch_tokens: int
    crop_tokens: int
    world: World
    stop_requested: Callable[[], bool]
    clock: Clock = field(default_factory=Clock)

    def answers(self, task: Task, examples: Sequence[Example], max_examples: int) -> list[Prediction]:
        """Answers to all examples of a task, the same on every rank."""
        started = time.perf_counter()
        lines = [example.line for example in examples]
        passage_of = dict(zip(lines, prompts.passages(examples), strict=True))
        groups = prompts.arrange(examples, max_examples, self.variant)
        self.clock.add("rendering", started)
        answers: list[Prediction] = []
        with self.model.room(self.crop_tokens):
            for group in groups:
                passages = [passage_of[example.line] for example in group]
                table = self._table(task, group, passages)
                for example, passage, line in zip(group, passages, table, strict=True):
                    answer, cropped, beyond, *losses = line
                    prediction = Prediction(
                        task=task.label,
                        index=len(answers),
                        line=example.line,
                        losses=tuple(losses[: example.options]),
                        answer=int(answer),
                        gold=example.gold,
                        cropped=int(cropped),
                        passage=passage,
                        category=example.category if self.variant == DCLM else "",
                        beyond=int(beyond),
                    )
                    answers.append(prediction)
        return answers

    def _table(self, task: Task, group: Sequence[Example], passages: Sequence[int]) -> list[list[float]]:
        """A line an example: answer, rows cropped, rows beyond the context, losses.

        Each rank fills the lines of its examples; their sum is the table.
        """
        tokens = Prompts(self.tokenizer, task, group, self.variant, self.clock)
        table = torch.zeros(len(group), 3 + max(example.options for example in group), dtype=torch.float32)
        is_lm, context = task.kind == core_bundle.LANGUAGE_MODELING, self.model.context_tokens
        for window in self._windows(tokens, passages if task.shots == 0 else range(len(group))):
            if self.stop_requested():
                break
            started = time.perf_counter()
            spans_of = {index: tokens.spans(index, self.crop_tokens) for index in window}
            self.clock.add("tokenizing", started)
            spans = [span for options in spans_of.values() for span in options]
            scores = iter(
                score_spans(self.model, spans, self.batch_tokens, with_argmax=is_lm, clock=self.clock)
            )
            for index, options in spans_of.items():
                losses, likeliest = zip(*(next(scores) for _ in options), strict=True)
                answer = (0 if likeliest[0] else -1) if is_lm else choose(losses)
                cropped = sum(span.cropped for span in options)
                beyond = sum(len(span.ids) > context and not span.cropped for span in options)
                table[index, : 3 + len(losses)] = torch.tensor([answer, cropped, beyond, *losses])
        lines: list[list[float]] = self.world.all_reduce_sum(table.to(self.world.device)).tolist()
        if self.world.any_rank(self.stop_requested()):
            raise Stopped
        return lines

    def _windows(self, tokens: Prompts, units: Sequence[int]) -> Iterator[list[int]]:
        """This rank's examples, some at a time: those of one unit, which share a passage, together."""
        costs = [tokens.tokens(index) for index in range(len(units))]
        ranks = batching.assign_ranks(costs, units, self.world.size)
        longest = dict.fromkeys(units, 0)
        for unit, cost in zip(units, costs, strict=True):
            longest[unit] = max(longest[unit], cost)
        mine = [index for index, rank in enumerate(ranks) if rank == self.world.rank]
        mine.sort(key=lambda index: (-longest[units[index]], units[index], index))
        for first in range(0, len(mine), WINDOW_EXAMPLES):
            yield mine[first : first + WINDOW_EXAMPLES]
