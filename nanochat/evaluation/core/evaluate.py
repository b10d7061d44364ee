"""CORE: find the bundle, score every option, and say what was found.

An option's loss is the mean negative log-likelihood (nats per token) of its span. Multiple choice and schema
tasks take the option of least loss; a language modeling task counts only if every token of the continuation
is the likeliest. What options share is computed once (core_batches), and the output head sees only the scored
positions. Spans, ties and corner cases are those of the variant (core_prompts).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nanochat.common import files
from nanochat.common.errors import UserError
from nanochat.common.stop_signals import Stopped
from nanochat.distributed.world import World
from nanochat.evaluation.core import batching, mini_bundle
from nanochat.evaluation.core import bundle as core_bundle
from nanochat.evaluation.core import prompts as core_prompts
from nanochat.evaluation.core.batching import Span
from nanochat.evaluation.core.bundle import Bundle, Example, Task
from nanochat.evaluation.core.prompt_tokens import Encoder, Prompts
from nanochat.evaluation.core.prompts import DCLM, NANOCHAT
from nanochat.evaluation.core.results import CoreResult, Prediction, TaskScore, choose, score_task
from nanochat.evaluation.core.scoring import Clock, Scorer, score_spans

# Examples whose rows are made at a time: at most 60 MB of ids (4 options of 3,800 tokens each).
WINDOW_EXAMPLES = 1024


def find_bundle(where: str) -> Bundle:
    """The bundle a person asked for: a path, "mini" for the small suite, "" for the base directory's.

    Raises:
        UserError: there is none.
    """
    if where == "mini":
        return Bundle.from_texts("core_mini", mini_bundle.build())
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
    batch_tokens: int = 16384,
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
        variant: one of core_prompts.VARIANTS.
        batch_tokens: most positions in a forward pass of several rows, padding included.
        crop_tokens: longer prompts lose their beginning; by default those that the model cannot read.
        keep_going: leave out tasks whose file is faulty; then there is no CORE.
        on_task: called on every rank with each task's score as soon as it is known.
        stop_requested: asked now and then; if it says so on any rank, all of them raise `Stopped`.

    Raises:
        UserError: a faulty bundle, all of which is checked first.
    """
    clock, started, limit = Clock(), time.perf_counter(), _crop_of(model, variant, crop_tokens)
    unkept: list[str] = []
    suite, faults = _load_suite(bundle, keep_going)
    clock.add("reading", started)
    scores, predictions = list[TaskScore](), list[Prediction]()
    for task, examples, digest in suite:
        job = _Job(model, tokenizer, task, variant, batch_tokens, limit, clock, stop_requested, unkept)
        answers = job.run(examples, max_per_task, world)
        scores.append(_score_of(task, digest, examples, answers))
        predictions.extend(answers)
        on_task(scores[-1])
    computed, finished, scored = _sums(clock, world)
    cropped = crop_tokens is not None or any(score.cropped_prompts for score in scores)
    return CoreResult(
        bundle=bundle.name,
        variant=variant,
        tasks=tuple(scores),
        predictions=tuple(predictions),
        context_tokens=model.context_tokens,
        crop_tokens=limit if cropped else None,
        seconds=time.perf_counter() - started,
        seconds_of=dict(clock.seconds),
        computed_tokens=computed,
        finished_tokens=finished,
        scored_tokens=scored,
        faults=faults,
        unkept=next(iter(unkept), ""),
    )


def _crop_of(model: Scorer, variant: str, asked: int | None) -> int:
    """How many tokens are left of longer prompts.

    By default karpathy/nanochat's prompts to our own models are whole, as there, as far as rotary tables go:
    to end on one longer prompt would lose the scores of all the others. Other prompts have the context.
    """
    if asked is None:
        return model.longest_tokens if variant == NANOCHAT else model.context_tokens
    if not 2 <= asked <= model.longest_tokens:
        raise UserError(
            f"--core-crop-tokens={asked}: expected 2 (a token and what follows it) to "
            f"{model.longest_tokens}, which this model can read. Or leave it out."
        )
    return asked


def _score_of(
    task: Task, digest: str, examples: Sequence[Example], answers: Sequence[Prediction]
) -> TaskScore:
    """The score, and the controls on the examples that were asked."""
    asked = {answer.line for answer in answers}
    controls = core_bundle.trivial_baselines([example for example in examples if example.line in asked])
    return score_task(task, digest, answers, controls)


def _sums(clock: Clock, world: World) -> list[int]:
    """Positions computed, finished and scored, over all ranks."""
    counts = torch.tensor([clock.tokens, clock.finished, clock.outputs], device=world.device)
    sums: list[int] = world.all_reduce_sum(counts).tolist()
    return sums


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
    stop_requested: Callable[[], bool]
    unkept: list[str]

    def run(self, examples: Sequence[Example], max_examples: int, world: World) -> list[Prediction]:
        """Answers to all examples, the same on every rank."""
        started = time.perf_counter()
        passage_of = dict(
            zip((example.line for example in examples), core_prompts.passages(examples), strict=True)
        )
        groups = core_prompts.arrange(self.task, examples, max_examples, self.variant)
        self.clock.add("rendering", started)
        answers: list[Prediction] = []
        with self.model.room(self.crop_tokens):
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
        self.unkept.extend(filter(None, [prompts.unkept]))
        # A line an example: answer, rows cropped, rows beyond the context, losses. Each rank fills its lines;
        # their sum is the table.
        table = torch.zeros(len(group), 3 + max(example.options for example in group), dtype=torch.float32)
        for window in self._windows(prompts, passages, world):
            if self.stop_requested():
                break
            started = time.perf_counter()
            rows = [prompts.rows(index, self.crop_tokens) for index in window]
            self.clock.add("tokenizing", started)
            spans = [Span(row.ids, row.start, row.end) for own in rows for row in own]
            found = iter(
                score_spans(
                    self.model,
                    spans,
                    self.batch_tokens,
                    with_argmax=self.task.kind == core_bundle.LANGUAGE_MODELING,
                    clock=self.clock,
                )
            )
            for index, own in zip(window, rows, strict=True):
                losses, greedy = zip(*(next(found) for _ in own), strict=True)
                is_choice = self.task.kind != core_bundle.LANGUAGE_MODELING
                answer = choose(losses) if is_choice else (0 if greedy[0] else -1)
                beyond = sum(len(row.ids) > self.model.context_tokens and not row.cropped for row in own)
                line = [answer, sum(row.cropped for row in own), beyond, *losses]
                table[index, : len(line)] = torch.tensor(line)
        filled = world.all_reduce_sum(table.to(world.device)).tolist()
        if world.any_rank(self.stop_requested()):
            raise Stopped
        return [
            self._prediction(first_index + index, example, passage, line)
            for index, (example, passage, line) in enumerate(zip(group, passages, filled, strict=True))
        ]

    def _prediction(self, index: int, example: Example, passage: int, line: list[float]) -> Prediction:
        """The answer to an example, from its line of the table."""
        return Prediction(
            task=self.task.label,
            index=index,
            line=example.line,
            losses=tuple(line[3 : 3 + example.options]),
            answer=int(line[0]),
            gold=example.gold,
            cropped=int(line[1]),
            beyond=int(line[2]),
            passage=passage,
            category=example.category if self.variant == DCLM else "",
        )

    def _windows(self, prompts: Prompts, passages: Sequence[int], world: World) -> Iterator[list[int]]:
        """This rank's examples, some at a time: those of one passage together, where they can share it."""
        costs = [prompts.tokens(index) for index in range(len(passages))]
        units = range(len(passages)) if self.task.shots else passages
        homes = batching.share_out(costs, units, world.size)
        longest = dict.fromkeys(units, 0)
        for unit, cost in zip(units, costs, strict=True):
            longest[unit] = max(longest[unit], cost)
        mine = [index for index, home in enumerate(homes) if home == world.rank]
        mine.sort(key=lambda index: (-longest[units[index]], units[index], index))
        for first in range(0, len(mine), WINDOW_EXAMPLES):
            yield mine[first : first + WINDOW_EXAMPLES]
