"""Scores of the chat tasks: accuracies, pass@k, centered means and their errors, differences of runs. Pure.

All of them follow from the answers, so that a score can be made again, and two runs compared item by item.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from nanochat.common.run_files import ChatAnswer
from nanochat.evaluation.core import statistics as core_statistics
from nanochat.evaluation.core.compare import Difference
from nanochat.evaluation.core.results import centre
from nanochat.evaluation.core.statistics import Stratum

CHATCORE = ("arc-easy", "arc-challenge", "mmlu", "gsm8k", "humaneval")  # the five of karpathy/nanochat
CHATCORE6 = (*CHATCORE, "spellingbee")  # its six, until July 2026
WITH_FLOOR = ("calc", "unit", "date", "identity", "count", "repeat", "spell", "choice")
BASELINES = dict.fromkeys(
    ("arc-easy", "arc-challenge", "mmlu", "choice", "choice-mixed"), 0.25
)  # of a guess; 0 elsewhere
MEANS = {"ChatCORE": CHATCORE, "ChatCORE6": CHATCORE6, "MADE": WITH_FLOOR}
MEASURED = ("accuracy", "stderr", "interval", "centered", "pass_at")


class TaskScore:
    """The score of one task, from the answers to all of its items.

    Attributes:
        verdicts: of the replies to each item, which is known by its id and prompt.
        baseline: accuracy of a guess.
        unjudged: replies without a verdict.
    """

    def __init__(self, task: str, answers: Sequence[ChatAnswer]) -> None:
        """Add up the answers; to each item there are as many."""
        self.answers, self.baseline = answers, BASELINES.get(task, 0.0)
        self.unjudged = sum(answer["right"] is None for answer in answers)
        self.verdicts: dict[tuple[str, str], list[bool]] = {}
        for answer in answers:
            self.verdicts.setdefault((answer["id"], answer["prompt"]), []).append(bool(answer["right"]))

    @functools.cached_property
    def fractions(self) -> dict[tuple[str, str], float]:
        """Fraction of right replies to each item."""
        return {item: fmean(verdicts) for item, verdicts in self.verdicts.items()}

    @functools.cached_property
    def stratum(self) -> Stratum:
        """These fractions for statistics."""
        return _stratum(self.fractions)

    @property
    def scale(self) -> float:
        """What an accuracy is multiplied by where a guess is 0 and perfection 1."""
        return 1 / (1 - self.baseline)

    @property
    def centered(self) -> float:
        """Accuracy on that scale."""
        return centre(self.stratum.mean, 100 * self.baseline)

    def as_dict(self) -> dict[str, Any]:
        """The fields of the task in chat_eval.json; null where something could not be judged."""
        too_long = sum(answer["reason"] == "context" and not answer["reply"] for answer in self.answers)
        counts: dict[str, Any] = {"examples": len(self.verdicts), "unjudged": self.unjudged}
        counts |= {"too_long": too_long, "baseline": self.baseline, "commonest": self._commonest()}
        if self.unjudged:
            return counts | dict.fromkeys(MEASURED)
        accuracy, stderr = self.stratum.mean, math.sqrt(self.stratum.variance)
        draws = accuracy * (1 - accuracy) / stderr**2 if stderr > 0 else len(self.stratum.sizes)
        interval = list(core_statistics.wilson(accuracy, draws))
        measured = accuracy, stderr, interval, self.centered, self._pass_at()
        return counts | dict(zip(MEASURED, measured, strict=True))

    def _commonest(self) -> float | None:
        """Fraction of items that got the commonest letter: near 1, the model does not read them."""
        letters = [
            one["reply"][0]["text"] for one in self.answers if one["judge"] == "letter" and one["reply"]
        ]
        return Counter(letters).most_common(1)[0][1] / len(letters) if letters else None

    def _pass_at(self) -> dict[str, float]:
        """pass@k for 1, 2, 4 ... and the number of replies n, without bias: 1 - C(n - c, k) / C(n, k)."""
        n = len(self.answers) // len(self.verdicts)
        counts = Counter(n - sum(verdicts) for verdicts in self.verdicts.values())  # of wrong replies
        ks = sorted({n, *(2**power for power in range(n.bit_length()))} if n > 1 else ())
        missed = {k: sum(math.comb(wrong, k) * items for wrong, items in counts.items()) for k in ks}
        return {str(k): 1 - missed[k] / math.comb(n, k) / counts.total() for k in ks}


def _stratum(value_of: Mapping[tuple[str, str], float]) -> Stratum:
    """Values by (id, prompt), added up by prompt: items that ask the same are one draw."""
    numbers = {prompt: number for number, (_, prompt) in enumerate(value_of)}
    return Stratum.of(list(value_of.values()), [numbers[prompt] for _, prompt in value_of])


@dataclass(frozen=True)
class ChatResult:
    """All that an evaluation found.

    Attributes:
        answers: all replies, task by task.
    """

    answers: tuple[ChatAnswer, ...]

    @functools.cached_property
    def tasks(self) -> dict[str, TaskScore]:
        """The scores by task, in the order of the answers."""
        by_task: dict[str, list[ChatAnswer]] = {}
        for answer in self.answers:
            by_task.setdefault(answer["task"], []).append(answer)
        return {task: TaskScore(task, answers) for task, answers in by_task.items()}

    @property
    def accuracies(self) -> dict[str, float]:
        """Accuracy by task, without tasks that could not be judged."""
        return {task: one.stratum.mean for task, one in self.tasks.items() if not one.unjudged}

    def mean(self, name: str) -> dict[str, Any] | None:
        """Mean of the centered accuracies of a key of `MEANS`; error and 95 % interval of resampled items.

        None where a task is missing or was not judged: a mean of fewer tasks is another metric.
        """
        if not set(MEANS[name]) <= self.accuracies.keys():
            return None
        scores = [self.tasks[task] for task in MEANS[name]]
        scales = [one.scale for one in scores]
        values = core_statistics.bootstrap([[one.stratum] for one in scores], scales)
        low, high = np.percentile(values, [2.5, 97.5]) + fmean(1 - scale for scale in scales)
        value, stderr = fmean(one.centered for one in scores), float(values.std(ddof=1))
        found = {"value": value, "stderr": stderr, "low": float(low), "high": float(high)}
        return {**found, "tasks": list(MEANS[name])}

    def as_dict(self) -> dict[str, Any]:
        """The scores of chat_eval.json."""
        tasks = {task: score.as_dict() for task, score in self.tasks.items()}
        return {"tasks": tasks, "means": {name: self.mean(name) for name in MEANS}}


def compare(a: ChatResult, b: ChatResult) -> tuple[list[Difference], list[Difference]]:
    """What B has more than A, where both answered the same items.

    Returns:
        Of the means that both have; of the tasks that both could judge, with p-values adjusted for being
        several.
    """
    tasks = {task: _difference(task, a, b) for task in a.accuracies if task in b.accuracies}
    means = []
    for name, members in MEANS.items():
        first, second = a.mean(name), b.mean(name)
        if first is not None and second is not None:
            parts = [tasks[task] for task in members]
            errors = [part.stderr * a.tasks[part.name].scale for part in parts]
            only = sum(part.only[0] for part in parts), sum(part.only[1] for part in parts)
            pairs, stderr = sum(part.pairs for part in parts), math.hypot(*errors) / len(errors)
            means.append(Difference(name, first["value"], second["value"], stderr, pairs, only))
    adjusted = core_statistics.holm([one.p_value for one in tasks.values()])
    found = [dataclasses.replace(one, p_holm=p) for one, p in zip(tasks.values(), adjusted, strict=True)]
    return means, found


def _difference(task: str, a: ChatResult, b: ChatResult) -> Difference:
    """The paired difference of a task; its number of pairs says all where prompts and verdicts are single."""
    first, second = a.tasks[task], b.tasks[task]
    gains = {item: second.fractions[item] - fraction for item, fraction in first.fractions.items()}
    gained, values = _stratum(gains), list(gains.values())
    only = sum(value < 0 for value in values), sum(value > 0 for value in values)
    exact = {*values} <= {-1.0, 0.0, 1.0} and len(gained.sizes) == len(values)
    stderr, means = math.sqrt(gained.variance), (first.stratum.mean, second.stratum.mean)
    return Difference(task, *means, stderr, len(values), only, exact)
