"""Scores of the chat tasks: accuracies, pass@k, centered means with their errors, differences of two runs. Pure.

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

from nanochat.chat.tasks import BASELINES, CHATCORE, CHATCORE6, WITH_FLOOR
from nanochat.evaluation.core import statistics as core_statistics
from nanochat.evaluation.core.compare import Difference
from nanochat.evaluation.core.results import centre
from nanochat.evaluation.core.statistics import Stratum

MEANS = {"ChatCORE": CHATCORE, "ChatCORE6": CHATCORE6, "MADE": WITH_FLOOR}


@dataclass(frozen=True)
class Answer:
    """One reply to one item, as a line of chat_answers.jsonl holds it.

    Attributes:
        task: name of the task.
        id: of the item, the same in every run.
        sample: number of the reply among those to the item.
        judge: how it was judged.
        prompt: what was asked.
        reply: its parts, each with "type" and "text".
        right: the verdict; None where there was none.
        sampled: tokens that the model chose; those that a tool forced are not among them.
        reason: why the reply ended; "context" without a reply where the prompt was too long for the model.
    """

    task: str
    id: str
    sample: int
    judge: str
    prompt: str
    reply: list[dict[str, str]]
    right: bool | None
    sampled: int
    reason: str


class TaskScore:
    """The score of one task, from the answers to all of its items."""

    def __init__(self, task: str, answers: Sequence[Answer]) -> None:
        """Add up by item; replies to an item are as many for each."""
        self.task, self.answers, self.baseline = task, answers, BASELINES.get(task, 0.0)
        self.unjudged = sum(answer.right is None for answer in answers)
        verdicts: dict[tuple[str, str], list[bool]] = {}
        for answer in answers:
            verdicts.setdefault((answer.id, answer.prompt), []).append(bool(answer.right))
        self.verdicts = verdicts

    @functools.cached_property
    def stratum(self) -> Stratum | None:
        """Fractions of right replies by item, where items with one prompt are one draw; None if unjudged."""
        return None if self.unjudged else _stratum({key: fmean(all_) for key, all_ in self.verdicts.items()})

    @property
    def scale(self) -> float:
        """What an accuracy is multiplied by where the random baseline is 0 and perfection 1."""
        return 1 / (1 - self.baseline)

    def as_dict(self) -> dict[str, object]:
        """The fields of the task in chat_eval.json; null where something could not be judged."""
        counts = {
            "examples": len(self.verdicts),
            "unjudged": self.unjudged,
            "too_long": sum(answer.reason == "context" and not answer.reply for answer in self.answers),
            "baseline": self.baseline,
            "commonest": self._commonest(),
        }
        if self.stratum is None:
            return counts | dict.fromkeys(("accuracy", "stderr", "interval", "centered", "pass_at"))
        accuracy, stderr = self.stratum.mean, math.sqrt(self.stratum.variance)
        draws = accuracy * (1 - accuracy) / stderr**2 if stderr > 0 else len(self.stratum.sizes)
        return counts | {
            "accuracy": accuracy,
            "stderr": stderr,
            "interval": list(core_statistics.wilson(accuracy, draws)),
            "centered": centre(accuracy, 100 * self.baseline),
            "pass_at": self._pass_at(),
        }

    def _commonest(self) -> float | None:
        """Fraction of items that got the commonest letter: near 1, the model does not read them."""
        letters = [one.reply[0]["text"] for one in self.answers if one.judge == "letter" and one.reply]
        return Counter(letters).most_common(1)[0][1] / len(letters) if letters else None

    def _pass_at(self) -> dict[str, float]:
        """pass@k for k of 1, 2, 4 ... and the number of replies n, without bias: 1 - C(n - c, k) / C(n, k)."""
        n = min(map(len, self.verdicts.values()))
        return {
            str(k): fmean(1 - math.comb(n - sum(all_), k) / math.comb(n, k) for all_ in self.verdicts.values())
            for k in sorted({n, *(2**power for power in range(n.bit_length() - 1))})
            if n > 1
        }


def _stratum(value_of: Mapping[tuple[str, str], float]) -> Stratum:
    """Values by (id, prompt), added up by prompt."""
    prompts = {prompt: number for number, (_, prompt) in enumerate(value_of)}
    return Stratum.of(list(value_of.values()), [prompts[prompt] for _, prompt in value_of])


@dataclass(frozen=True)
class ChatResult:
    """All that an evaluation found.

    Attributes:
        answers: all replies, task by task.
    """

    answers: tuple[Answer, ...]

    @functools.cached_property
    def tasks(self) -> dict[str, TaskScore]:
        """The scores by task, in the order of the answers."""
        by_task: dict[str, list[Answer]] = {}
        for answer in self.answers:
            by_task.setdefault(answer.task, []).append(answer)
        return {task: TaskScore(task, answers) for task, answers in by_task.items()}

    @property
    def accuracies(self) -> dict[str, float]:
        """Accuracy by task, without tasks that could not be judged."""
        return {task: one.stratum.mean for task, one in self.tasks.items() if one.stratum is not None}

    def mean(self, name: str) -> dict[str, float] | None:
        """Mean of the centered accuracies of a key of `MEANS`, with error and 95 % interval of resampled items.

        None where a task is missing or was not judged: a mean of fewer tasks is another metric.
        """
        scores = [self.tasks[task] for task in MEANS[name] if task in self.accuracies]
        if len(scores) < len(MEANS[name]):
            return None
        strata = [[one.stratum] for one in scores if one.stratum is not None]
        scales = [one.scale for one in scores]
        offset = fmean(1 - scale for scale in scales)
        values = core_statistics.bootstrap(strata, scales) + offset
        low, high = np.percentile(values, [2.5, 97.5])
        value = fmean(centre(self.accuracies[one.task], 100 * one.baseline) for one in scores)
        return {"value": value, "stderr": float(values.std(ddof=1)), "low": float(low), "high": float(high)}

    def as_dict(self) -> dict[str, Any]:
        """The scores of chat_eval.json."""
        tasks = {task: score.as_dict() for task, score in self.tasks.items()}
        return {"tasks": tasks, "means": {name: self.mean(name) for name in MEANS}}


def compare(a: ChatResult, b: ChatResult) -> list[Difference]:
    """What B has more than A by item: task by task, with p-values adjusted for their number, then the means.

    Tasks that either could not judge are left out. Both must have answered the same items.
    """
    tasks = {task: _difference(task, a, b) for task in a.accuracies if task in b.accuracies}
    adjusted = core_statistics.holm([one.p_value for one in tasks.values()])
    found = [dataclasses.replace(one, p_holm=p) for one, p in zip(tasks.values(), adjusted, strict=True)]
    for name, members in MEANS.items():
        first, second = a.mean(name), b.mean(name)
        if first is None or second is None:
            continue
        parts = [tasks[task] for task in members]
        scaled = [tasks[task].stderr * a.tasks[task].scale for task in members]
        stderr = math.sqrt(sum(error**2 for error in scaled)) / len(members)
        only = sum(part.only[0] for part in parts), sum(part.only[1] for part in parts)
        pairs = sum(part.pairs for part in parts)
        found.append(Difference(name, first["value"], second["value"], stderr, pairs, only))
    return found


def _difference(task: str, a: ChatResult, b: ChatResult) -> Difference:
    one, two = ({key: fmean(of) for key, of in run.tasks[task].verdicts.items()} for run in (a, b))
    gains = {key: two[key] - one[key] for key in one}
    gained, values = _stratum(gains), list(gains.values())
    only = sum(value < 0 for value in values), sum(value > 0 for value in values)
    exact = {*values} <= {-1.0, 0.0, 1.0} and len(gained.sizes) == len(values)
    stderr = math.sqrt(gained.variance)
    return Difference(task, a.accuracies[task], b.accuracies[task], stderr, len(values), only, exact)
