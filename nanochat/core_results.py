"""What an evaluation of CORE found: answers, accuracies, their mean on a common scale, errors. Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

# CORE of GPT-2, 1558 M parameters (CORE.md part 7: at most 1000 examples a task): the bar of the speedrun.
GPT2_CORE = 0.256525


@dataclass(frozen=True)
class Prediction:
    """The answer to one example.

    Attributes:
        task: label of the task.
        index: place of the example in the shuffled task.
        line: line of the example in the task's file, from 1.
        losses: mean nats per token of each option; NaN where the span is empty.
        answer: the option taken; -1 where a continuation was not the likeliest.
        gold: the right option.
        cropped: how many of its rows were cut to the context.
    """

    task: str
    index: int
    line: int
    losses: tuple[float, ...]
    answer: int
    gold: int
    cropped: int

    def as_json(self) -> str:
        """One line of core_predictions.jsonl."""
        losses = [None if math.isnan(nats) else round(nats, 6) for nats in self.losses]
        fields = {"task": self.task, "index": self.index, "line": self.line, "losses": losses}
        return json.dumps({**fields, "answer": self.answer, "gold": self.gold, "cropped": self.cropped})


@dataclass(frozen=True)
class TaskScore:
    """The score of one task.

    >>> score = TaskScore("t", "multiple_choice", 0, 25.0, examples=100, correct=40, cropped_prompts=0)
    >>> round(score.accuracy, 6), round(score.centered, 6), round(score.stderr, 6)
    (0.4, 0.2, 0.04899)
    """

    label: str
    kind: str
    shots: int
    baseline_percent: float
    examples: int
    correct: int
    cropped_prompts: int

    @property
    def accuracy(self) -> float:
        """Share of examples answered rightly."""
        return self.correct / self.examples

    @property
    def stderr(self) -> float:
        """Binomial standard error of the accuracy."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.examples)

    @property
    def centered(self) -> float:
        """Accuracy on a scale where guessing is 0 and perfection 1."""
        return centre(self.accuracy, self.baseline_percent)


@dataclass(frozen=True)
class CoreResult:
    """All that an evaluation found."""

    bundle: str
    tasks: tuple[TaskScore, ...]
    predictions: tuple[Prediction, ...]
    crop_tokens: int
    seconds: float

    @property
    def core_metric(self) -> float:
        """Plain mean of the centered accuracies."""
        return sum(task.centered for task in self.tasks) / len(self.tasks)

    @property
    def core_stderr(self) -> float:
        """Standard error of the mean, from the tasks' binomial errors; the set of tasks is taken as given."""
        variances = (task.stderr**2 / (1 - task.baseline_percent / 100) ** 2 for task in self.tasks)
        return math.sqrt(sum(variances)) / len(self.tasks)

    @property
    def examples_per_second(self) -> float:
        """Examples scored per second, over all ranks."""
        return len(self.predictions) / self.seconds

    def as_dict(self) -> dict[str, object]:
        """The fields of base_eval.json."""
        tasks = {
            task.label: {
                "accuracy": task.accuracy,
                "centered": task.centered,
                "stderr": task.stderr,
                "examples": task.examples,
                "baseline": task.baseline_percent / 100,
                "shots": task.shots,
                "type": task.kind,
                "cropped_prompts": task.cropped_prompts,
            }
            for task in self.tasks
        }
        return {
            "core_metric": self.core_metric,
            "core_stderr": self.core_stderr,
            "tasks": tasks,
            "bundle": self.bundle,
            "crop_tokens": self.crop_tokens,
            "seconds": self.seconds,
            "examples_per_second": self.examples_per_second,
        }

    def predictions_jsonl(self) -> str:
        """The text of core_predictions.jsonl."""
        return "".join(prediction.as_json() + "\n" for prediction in self.predictions)


def centre(accuracy: float, baseline_percent: float) -> float:
    """Accuracy with guessing moved to 0: (a - b) / (1 - b).

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
