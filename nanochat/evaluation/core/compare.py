"""Runs against each other: the paired difference of two by example, and the mean of several seeds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.common import files, run_files
from nanochat.common.errors import UserError
from nanochat.evaluation.core import statistics as core_statistics
from nanochat.evaluation.core.results import GPT2_CORE, GPT2_CORE_STDERR, describe_probability, is_core
from nanochat.evaluation.core.statistics import Stratum
from nanochat.evaluation.score_files import ANSWERS, SCORES, digest_of

# What must be the same for two scores to be about the same questions, in the scores and of each task. Those
# of older versions do not have all of it, and are then known by the name of the bundle.
SAME = ("core_variant", "max_per_task")
SAME_OF_TASK = ("sha256", "type", "shots", "delimiter", "baseline_v1")
FEW = 25  # pairs that differ, below which their number is tested exactly
OF_AN_ANSWER = {"task": str, "line": int, "answer": int, "gold": int, "passage": int}


@dataclass(frozen=True)
class Difference:
    """What B has more than A, with the standard error of pairs.

    Attributes:
        name: of the task, or CORE.
        first: A's accuracy, or CORE.
        second: B's.
        stderr: of second - first.
        pairs: examples that both answered.
        only_first: examples that only A answered rightly.
        only_second: examples that only B answered rightly.
        exact: whether the examples are independent draws of one task, so that these two say all.
        p_holm: the p-value of a task, adjusted for the number of tasks.
    """

    name: str
    first: float
    second: float
    stderr: float
    pairs: int
    only_first: int
    only_second: int
    exact: bool = False
    p_holm: float = math.nan

    @property
    def p_value(self) -> float:
        """How often so large a difference, of either sign, would come of equals: exact where it is of few."""
        if self.exact and self.only_first + self.only_second < FEW:
            return core_statistics.exact_mcnemar(self.only_first, self.only_second)
        if self.stderr == 0:
            return 1.0 if self.first == self.second else 0.0
        return 2 * core_statistics.normal_cdf(-abs(self.second - self.first) / self.stderr)


@dataclass(frozen=True)
class Scored:
    """A run's scores and answers as they lie on the disk."""

    run: str
    scores: dict[str, Any]
    answers: dict[tuple[str, int], dict[str, Any]]

    @staticmethod
    def read(run: str, with_answers: bool = True) -> Scored:
        """Read base_eval.json and core_predictions.jsonl of a run.

        Raises:
            UserError: the run was not scored with CORE, or by an older version.
        """
        folder = files.run_dir(run)
        again = f"Score it: python -m scripts.base_eval --run {run} --eval core"
        if not (folder / SCORES).is_file():
            raise UserError(f"run {run!r}: there is no {folder / 'base_eval.json'}. {again}")
        scores = run_files.read_scores(run)
        if scores.get("core_metric") is None or "core_variant" not in scores or not scores.get("tasks"):
            raise UserError(f"{folder / SCORES}: holds no CORE of this version. {again}")
        lines = _read_answers(folder / ANSWERS, scores, again) if with_answers else []
        return Scored(run, scores, {(line["task"], line["line"]): line for line in lines})


def _read_answers(path: Path, scores: dict[str, Any], again: str) -> list[dict[str, Any]]:
    """The answers that the scores are made of."""
    lines = run_files.read_lines(path, dict)
    if not lines or any(
        type(line.get(name)) is not kind for line in lines for name, kind in OF_AN_ANSWER.items()
    ):
        raise UserError(f"{path}: holds no answers of this version. {again}")
    # Two files cannot be renamed as one: a kill between them leaves answers of another scoring.
    digest = scores.get("answers_sha256")
    if digest is not None and digest != digest_of(path.read_bytes()):
        raise UserError(f"{path}: these are not the answers that {SCORES} is of. {again}")
    return lines


def compare(run_a: str, run_b: str) -> list[Difference]:
    """What run B has more than run A, CORE first, then task by task.

    Raises:
        UserError: one was not scored, or they were asked different questions.
    """
    a, b = Scored.read(run_a), Scored.read(run_b)
    _require_same([a, b])
    if a.answers.keys() != b.answers.keys():
        raise UserError(f"runs {run_a!r} and {run_b!r} answered different examples. Score both again alike.")
    tasks = []
    variance = 0.0
    for label, fields in a.scores["tasks"].items():
        keys = [key for key in a.answers if key[0] == label]
        difference = _task_difference(label, [(a.answers[key], b.answers[key]) for key in keys])
        tasks.append(difference)
        variance += (difference.stderr / (1 - fields["baseline"])) ** 2
    adjusted = core_statistics.holm([task.p_value for task in tasks])
    tasks = [dataclasses.replace(task, p_holm=p) for task, p in zip(tasks, adjusted, strict=True)]
    whole = Difference(
        "CORE",
        a.scores["core_metric"],
        b.scores["core_metric"],
        math.sqrt(variance) / len(tasks),
        len(a.answers),
        sum(task.only_first for task in tasks),
        sum(task.only_second for task in tasks),
    )
    return [whole, *tasks]


def _require_same(runs: Sequence[Scored]) -> None:
    first = runs[0]
    for other in runs[1:]:
        for name in SAME:
            _require_equal(name, first, other, first.scores.get(name), other.scores.get(name))
        _require_equal("crop_tokens", first, other, _crop_of(first), _crop_of(other))
        if first.scores["tasks"].keys() != other.scores["tasks"].keys():
            raise UserError(f"runs {first.run!r} and {other.run!r} were scored on different tasks.")
        for label, fields in first.scores["tasks"].items():
            for name in SAME_OF_TASK:
                one, two = fields.get(name), other.scores["tasks"][label].get(name)
                if one is not None and two is not None:
                    _require_equal(f"{name} of {label}", first, other, one, two)
        if not all("sha256" in fields for one in (first, other) for fields in one.scores["tasks"].values()):
            _require_equal("bundle", first, other, first.scores.get("bundle"), other.scores.get("bundle"))


def _require_equal(name: str, first: Scored, other: Scored, one: object, two: object) -> None:
    if one != two:
        raise UserError(
            f"run {other.run!r} was scored with {name}={two}, run {first.run!r} with {one}. Score both alike."
        )


def _crop_of(scored: Scored) -> object:
    """How far prompts were cropped; None where none was, whatever the limit."""
    cropped = any(fields.get("cropped_prompts", 1) for fields in scored.scores["tasks"].values())
    return scored.scores.get("crop_tokens") if cropped else None


def _task_difference(label: str, pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> Difference:
    right = [(one["answer"] == one["gold"], two["answer"] == two["gold"]) for one, two in pairs]
    groups: dict[str, list[int]] = {}
    for place, (one, _) in enumerate(pairs):
        groups.setdefault(one.get("category", ""), []).append(place)
    strata, means = [], []
    exact = len(groups) == 1 and len({one["passage"] for one, _ in pairs}) == len(pairs)
    for places in groups.values():
        passages = [pairs[place][0]["passage"] for place in places]
        strata.append(Stratum.of([float(right[place][1]) - right[place][0] for place in places], passages))
        means.append([sum(right[place][side] for place in places) / len(places) for side in (0, 1)])
    first, second = (sum(mean[side] for mean in means) / len(means) for side in (0, 1))
    only = [sum(pair == sign for pair in right) for sign in ((True, False), (False, True))]
    return Difference(
        label, first, second, core_statistics.stderr_of_mean(strata), len(pairs), only[0], only[1], exact
    )


@dataclass(frozen=True)
class Claim:
    """What may be said of a recipe, and how sure it is.

    Attributes:
        what: the error that is meant.
        stderr: of the mean of the seeds.
        verdict: on GPT-2's figure; empty where it is not comparable.
    """

    what: str
    stderr: float
    verdict: str


@dataclass(frozen=True)
class Combined:
    """Several seeds of one recipe.

    Attributes:
        runs: their names.
        values: their CORE.
        mean: of these.
        stderr: of the mean, from the spread between the runs.
        questions: standard error that the questions give one run; None where the scores do not say.
        comparable: whether GPT-2's figure is about the same questions.
    """

    runs: tuple[str, ...]
    values: tuple[float, ...]
    mean: float
    stderr: float
    questions: float | None
    comparable: bool

    @property
    def claims(self) -> tuple[Claim, ...]:
        """Of the recipe on these questions: all seeds answered the same ones. And at such questions."""
        seeds = self._claim("mean and standard error on these questions, by the spread", 0.0)
        if self.questions is None:
            return (seeds,)
        return seeds, self._claim("with the error of the questions, mean", self.questions)

    def _claim(self, what: str, questions: float) -> Claim:
        if not self.comparable:
            return Claim(what, math.hypot(self.stderr, questions), "")
        known = questions**2 + GPT2_CORE_STDERR**2
        degrees = core_statistics.degrees_of_sum(self.stderr**2, known, len(self.values) - 1)
        error = math.sqrt(self.stderr**2 + known)
        above = core_statistics.probability_above(self.mean, error, GPT2_CORE, degrees)
        return Claim(what, math.hypot(self.stderr, questions), describe_probability(above))


def combine(runs: Sequence[str]) -> Combined:
    """Mean and standard error of the CORE of several runs.

    Raises:
        UserError: fewer than two, one twice, one not scored, or scored on different questions.
    """
    if len(runs) < 2 or len(set(runs)) < len(runs):
        raise UserError(f"--combine {' '.join(runs)}: expected two or more different runs.")
    found = [Scored.read(run, with_answers=False) for run in runs]
    _require_same(found)
    values = tuple(float(one.scores["core_metric"]) for one in found)
    mean, stderr = core_statistics.mean_and_stderr(values)
    scores = found[0].scores
    comparable = scores["core_variant"] == "nanochat" and is_core(scores["tasks"])
    errors = [one.scores.get("core_stderr") for one in found]
    known = [float(error) for error in errors if isinstance(error, int | float)]
    questions = sum(known) / len(known) if len(known) == len(errors) else None
    return Combined(tuple(runs), values, mean, stderr, questions, comparable)
