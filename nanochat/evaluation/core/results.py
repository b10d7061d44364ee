"""Results of CORE: answers, accuracies, their centered mean, its error. Pure.

What each score is made of is kept with it, so that two runs can be compared example by example.
"""

from __future__ import annotations

import csv
import functools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanochat.evaluation.core import statistics as core_statistics
from nanochat.evaluation.core.bundle import Example, Task, trivial_baselines
from nanochat.evaluation.core.statistics import Stratum

# CORE of GPT-2, 1558 M parameters (CORE.md part 7: at most 1000 examples a task): the bar of the speedrun.
GPT2_CORE = 0.256525
# Of the draw of those 1000, against all examples: for a score of ours on all of them the bar is not exact.
GPT2_CORE_STDERR = 0.0029
THESE_WEIGHTS = "these weights at such questions; another seed of the recipe is not in it"

# Fields of base_eval.json that bear the name of an attribute here, and fields of an answer that may be empty.
CORE_FIELDS = ("core_metric", "core_stderr", "core_bootstrap", "bundle", "faults", "context_tokens")
SIZE_FIELDS = ("crop_tokens", "examples_per_second", "computed_tokens", "scored_tokens")
TASK_FIELDS = ("accuracy", "stderr", "interval", "examples", "passages", "sha256", "controls")
LENGTH_FIELDS = ("cropped_prompts", "beyond_prompts")
OPTIONAL = ("category", "beyond")

# What DCLM corrected in September 2025; the bundle's own table is the first version.
BASELINES_V2 = {"commonsense_qa": 40.3, "agi_eval_lsat_ar": 25.0, "bigbench_language_identification": 25.0}


@functools.cache
def gpt2_accuracy() -> dict[str, tuple[float, float]]:
    """Accuracies of GPT-2 by task: with 124 M (all examples) and 1558 M parameters (at most 1000 a task).

    With nanochat's prompts: openai-community-gpt2.csv and openai-community-gpt2-xl.csv of the public bundle.
    """
    lines = Path(__file__).with_name("gpt2_accuracy.csv").read_text("utf-8").splitlines()
    return {row["task"]: (float(row["gpt2"]), float(row["gpt2-xl"])) for row in csv.DictReader(lines)}


def is_core(labels: Iterable[str]) -> bool:
    """Whether these are CORE's tasks: no other suite may be compared to GPT-2's figure."""
    return set(labels) == set(gpt2_accuracy())


@dataclass(frozen=True)
class Prediction:
    """The answer to one example.

    Attributes:
        task: label of the task.
        index: place of the example in the order of scoring.
        line: line of the example in the task's file, from 1.
        losses: mean nats per token of each option; NaN where the span is empty.
        answer: the option taken; -1 where a continuation was not the likeliest.
        gold: the right option.
        cropped: how many of its rows lost their beginning.
        passage: number of the passage it is about.
        category: of the example, where its task is scored by categories; else empty.
        beyond: how many of its rows were longer than the model's context, and read whole.
    """

    task: str
    index: int
    line: int
    losses: tuple[float, ...]
    answer: int
    gold: int
    cropped: int
    passage: int
    category: str = ""
    beyond: int = 0

    def as_json(self, step: int | None = None) -> str:
        """One line of core_predictions.jsonl, with the step of the checkpoint, if it is of one."""
        fields = vars(self) | {
            "losses": [None if math.isnan(nats) else round(nats, 6) for nats in self.losses]
        }
        written = {name: value for name, value in fields.items() if value or name not in OPTIONAL}
        return json.dumps(({} if step is None else {"step": step}) | written)


@dataclass(frozen=True)
class TaskScore:
    """The score of one task.

    Attributes:
        task: the task.
        sha256: of the task's file, which says which questions they were.
        examples: how many were scored.
        strata: right answers by category, or of all examples.
        cropped_prompts: how many rows lost their beginning.
        beyond_prompts: how many rows were longer than the context, and read whole.
        controls: accuracies of trivial baselines, by name.
    """

    task: Task
    sha256: str
    examples: int
    strata: Sequence[Stratum]
    cropped_prompts: int
    beyond_prompts: int
    controls: dict[str, float]

    @property
    def label(self) -> str:
        """Name of the task."""
        return self.task.label

    @property
    def accuracy(self) -> float:
        """Fraction of examples answered rightly; with categories, the plain mean of theirs."""
        return core_statistics.mean_of(self.strata)

    @property
    def stderr(self) -> float:
        """Standard error of the accuracy: binomial, or of passages where prompts repeat them."""
        return core_statistics.stderr_of_mean(self.strata)

    @property
    def interval(self) -> list[float]:
        """95 % interval of the accuracy, by Wilson: 0 of 32 right is no proof of 0.

        Draws are counted as many as independent ones would give the standard error, or as passages.
        """
        p = self.accuracy
        draws = p * (1 - p) / self.stderr**2 if self.stderr > 0 else self.passages
        return list(core_statistics.wilson(p, draws))

    @property
    def passages(self) -> int:
        """How many independent draws there are."""
        return sum(len(stratum.sizes) for stratum in self.strata)

    def baseline(self, version: int) -> float:
        """The random baseline in percent, by DCLM's first table or its second."""
        first = self.task.baseline_percent
        return BASELINES_V2.get(self.label, first) if version == 2 else first

    def centered(self, version: int = 1) -> float:
        """Accuracy on a scale where the random baseline is 0 and perfection 1."""
        return centre(self.accuracy, self.baseline(version))

    def scale(self, version: int = 1) -> float:
        """What an accuracy is multiplied by on that scale."""
        return 1 / (1 - self.baseline(version) / 100)

    def as_dict(self, version: int) -> dict[str, object]:
        """The fields of a task in base_eval.json."""
        return {name: getattr(self, name) for name in TASK_FIELDS + LENGTH_FIELDS} | {
            "type": self.task.kind,
            "shots": self.task.shots,
            "delimiter": self.task.delimiter,
            "centered": self.centered(version),
            "baseline": self.baseline(version) / 100,
            "baseline_v1": self.baseline(1) / 100,
            "baseline_v2": self.baseline(2) / 100,
        }


def score_task(
    task: Task, sha256: str, examples: Sequence[Example], answers: Sequence[Prediction]
) -> TaskScore:
    """The right answers of one task, by category where it has them, and those of trivial baselines."""
    scored = {answer.line for answer in answers}
    return TaskScore(
        task,
        sha256,
        len(answers),
        Stratum.by_category((float(one.answer == one.gold), one.passage, one.category) for one in answers),
        sum(answer.cropped for answer in answers),
        sum(answer.beyond for answer in answers),
        trivial_baselines([example for example in examples if example.line in scored]),
    )


@dataclass(frozen=True)
class CoreResult:
    """All that an evaluation found.

    Attributes:
        bundle: name of the bundle.
        variant: of the prompts.
        tasks: their scores, in the order of the bundle.
        predictions: the answers to all examples.
        context_tokens: length that the model was trained for.
        crop_tokens: what was left of longer prompts, which lost their beginning; None where none was cropped.
        seconds: of all of it.
        seconds_of: of its parts, on the first rank.
        computed_tokens: positions that went through the model, over all ranks.
        scored_tokens: those that went through the head.
        faults: by label, what was wrong with the tasks left out.
    """

    bundle: str
    variant: str
    tasks: tuple[TaskScore, ...]
    predictions: tuple[Prediction, ...]
    context_tokens: int
    crop_tokens: int | None
    seconds: float
    seconds_of: dict[str, float]
    computed_tokens: int
    scored_tokens: int
    faults: dict[str, str]

    @property
    def version(self) -> int:
        """Which table of baselines the variant means."""
        return 2 if self.variant == "dclm" else 1

    @property
    def core_metric(self) -> float | None:
        """Plain mean of the centered accuracies; None where a task is missing."""
        return self.core(self.version)

    def core(self, version: int) -> float | None:
        """CORE by one of the two tables of baselines."""
        if self.faults:
            return None
        return sum(task.centered(version) for task in self.tasks) / len(self.tasks)

    @property
    def core_stderr(self) -> float | None:
        """Standard error of the mean, from the tasks' errors; the set of tasks is taken as given."""
        if self.faults:
            return None
        variances = ((task.stderr * task.scale(self.version)) ** 2 for task in self.tasks)
        return math.sqrt(sum(variances)) / len(self.tasks)

    @functools.cached_property
    def core_bootstrap(self) -> dict[str, float] | None:
        """Standard error and 95 % interval of CORE from resampled examples."""
        if self.faults:
            return None
        scales = [task.scale(self.version) for task in self.tasks]
        values = core_statistics.bootstrap([task.strata for task in self.tasks], scales)
        low, high = np.percentile(values, [2.5, 97.5])
        offset = sum(1 - scale for scale in scales) / len(scales)  # of a scale where chance is 0
        return {
            "stderr": float(values.std(ddof=1)),
            "low": float(low + offset),
            "high": float(high + offset),
            "samples": float(len(values)),
        }

    @property
    def examples_per_second(self) -> float:
        """Examples scored per second, over all ranks."""
        return len(self.predictions) / self.seconds

    def as_dict(self) -> dict[str, object]:
        """The fields of base_eval.json."""
        return {name: getattr(self, name) for name in CORE_FIELDS + SIZE_FIELDS} | {
            "core_v1": self.core(1),
            "core_v2": self.core(2),
            "core_variant": self.variant,
            "tasks": {task.label: task.as_dict(self.version) for task in self.tasks},
            "core_seconds": {"all": self.seconds, **self.seconds_of},
        }

    def predictions_jsonl(self, step: int | None = None) -> str:
        """The text of core_predictions.jsonl, of the checkpoint of a step."""
        return "".join(prediction.as_json(step) + "\n" for prediction in self.predictions)

    def describe_length(self) -> str:
        """What became of prompts longer than the context, in a sentence; empty where there were none."""
        cropped = sum(task.cropped_prompts for task in self.tasks)
        beyond = sum(task.beyond_prompts for task in self.tasks)
        notes = {
            f"{cropped} prompts were cropped to their last {self.crop_tokens} tokens, without BOS; "
            "karpathy/nanochat crops none of its own models' prompts": cropped,
            f"{beyond} prompts were longer than the context of {self.context_tokens} tokens and read "
            "whole, as karpathy/nanochat reads them": beyond,
        }
        return "; ".join(note for note, count in notes.items() if count)


def verdict(labels: Iterable[str], variant: str, value: float | None, stderr: float | None) -> str:
    """One sentence on GPT-2's figure and one run; empty where the score is not comparable to it."""
    if value is None or stderr is None or variant != "nanochat" or not is_core(labels):
        return ""
    above = core_statistics.probability_above(value, math.hypot(stderr, GPT2_CORE_STDERR), GPT2_CORE)
    return f"{describe_probability(above)} ({THESE_WEIGHTS})"


def describe_probability(above: float) -> str:
    """The verdict on GPT-2's figure, whose own error is in the probability.

    >>> describe_probability(0.9)
    'above the 0.256525 +- 0.0029 of GPT-2 1558M with probability 0.900'
    >>> describe_probability(0.0004)
    'below the 0.256525 +- 0.0029 of GPT-2 1558M with probability above 0.999'
    """
    side, sure = ("above", above) if above >= 0.5 else ("below", 1 - above)
    shown = f"{sure:.3f}" if sure < 0.9995 else "above 0.999"
    return f"{side} the {GPT2_CORE} +- {GPT2_CORE_STDERR} of GPT-2 1558M with probability {shown}"


def centre(accuracy: float, baseline_percent: float) -> float:
    """Accuracy with the random baseline moved to 0: (a - b) / (1 - b).

    >>> round(centre(0.62, 62), 12), centre(1.0, 25), centre(0.0, 50)
    (0.0, 1.0, -1.0)
    """
    return (accuracy - 0.01 * baseline_percent) / (1 - 0.01 * baseline_percent)


def choose(losses: Sequence[float]) -> int:
    """Index of the least loss, the first of equals.

    A loss of NaN (an empty span: one option's tokens begin another's) wins where it comes first and loses
    everywhere else, which is what karpathy/nanochat answers.

    >>> choose([2.0, 1.0, 1.0]), choose([math.nan, 1.0]), choose([2.0, math.nan, 1.0])
    (1, 0, 2)
    """
    best = 0
    for index, nats in enumerate(losses):
        if nats < losses[best]:
            best = index
    return best
