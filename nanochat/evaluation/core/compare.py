"""Comparison of scored runs: the paired difference of two, example by example, and the mean of several seeds.

Two runs answer the same questions, so their difference is much surer than each of their scores.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
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
        only: examples that only A answered rightly, and those that only B did.
        exact: whether the examples are independent draws of one task, so that these two say all.
        p_holm: the p-value of a task, adjusted for the number of tasks.
    """

    name: str
    first: float
    second: float
    stderr: float
    pairs: int
    only: tuple[int, int]
    exact: bool = False
    p_holm: float = math.nan

    @property
    def p_value(self) -> float:
        """Two-sided p-value of the difference: exact where few pairs differ, else of the normal one."""
        if self.exact and sum(self.only) < FEW:
            return core_statistics.exact_mcnemar(*self.only)
        if self.stderr == 0:
            return 1.0 if self.first == self.second else 0.0
        return 2 * NormalDist().cdf(-abs(self.second - self.first) / self.stderr)


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

    def conditions(self) -> dict[str, object]:
        """What must be the same in two scores on the same questions, by its name in a message."""
        tasks = self.scores["tasks"]
        cropped = any(fields.get("cropped_prompts", 1) for fields in tasks.values())
        same = {name: self.scores.get(name) for name in SAME}
        # How far prompts were cropped says nothing where none was.
        same["crop_tokens"] = self.scores.get("crop_tokens") if cropped else None
        for label, fields in tasks.items():
            known = [name for name in SAME_OF_TASK if fields.get(name) is not None]
            same |= {f"{name} of {label}": fields[name] for name in known}
        return same


def _read_answers(path: Path, scores: dict[str, Any], again: str) -> list[dict[str, Any]]:
    """The answers that the scores are made of."""
    lines = run_files.read_lines(path, dict)
    answers = [all(type(line.get(name)) is kind for name, kind in OF_AN_ANSWER.items()) for line in lines]
    if not lines or not all(answers):
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
    tasks, variance = [], 0.0
    for label, fields in a.scores["tasks"].items():
        keys = [key for key in a.answers if key[0] == label]
        tasks.append(_task_difference(label, [(a.answers[key], b.answers[key]) for key in keys]))
        variance += (tasks[-1].stderr / (1 - fields["baseline"])) ** 2
    adjusted = core_statistics.holm([task.p_value for task in tasks])
    tasks = [dataclasses.replace(task, p_holm=p) for task, p in zip(tasks, adjusted, strict=True)]
    first, second = (run.scores["core_metric"] for run in (a, b))
    only_first, only_second = (sum(task.only[side] for task in tasks) for side in (0, 1))
    stderr = math.sqrt(variance) / len(tasks)
    return [Difference("CORE", first, second, stderr, len(a.answers), (only_first, only_second)), *tasks]


def _require_same(runs: Sequence[Scored]) -> None:
    first, *others = runs
    for other in others:
        if first.scores["tasks"].keys() != other.scores["tasks"].keys():
            raise UserError(f"runs {first.run!r} and {other.run!r} were scored on different tasks.")
        one, two = first.conditions(), other.conditions()
        # Scores of older versions lack the hashes of their questions, and are known by the bundle's name.
        if not all(f"sha256 of {label}" in both for both in (one, two) for label in first.scores["tasks"]):
            one["bundle"], two["bundle"] = first.scores.get("bundle"), other.scores.get("bundle")
        for name, value in one.items():
            if name in two and two[name] != value:
                raise UserError(
                    f"run {other.run!r} was scored with {name}={two[name]}, run {first.run!r} with "
                    f"{value}. Score both alike."
                )


def _task_difference(label: str, pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> Difference:
    right = [[float(line["answer"] == line["gold"]) for line in lines] for lines in zip(*pairs, strict=True)]
    gains = [two - one for one, two in zip(*right, strict=True)]
    passages = [line["passage"] for line, _ in pairs]
    categories = [line.get("category", "") for line, _ in pairs]
    first, second, gained = (
        Stratum.by_category(zip(values, passages, categories, strict=True)) for values in (*right, gains)
    )
    means = core_statistics.mean_of(first), core_statistics.mean_of(second)
    exact = len(gained) == 1 and len(set(passages)) == len(passages)
    only = gains.count(-1), gains.count(1)
    return Difference(label, *means, core_statistics.stderr_of_mean(gained), len(gains), only, exact)


@dataclass(frozen=True)
class Claim:
    """What may be said of a recipe, and how sure it is.

    Attributes:
        what: the error that is meant.
        mean: of the seeds.
        stderr: of that mean.
        verdict: on GPT-2's figure; empty where it is not comparable.
    """

    what: str
    mean: float
    stderr: float
    verdict: str


def combine(runs: Sequence[str]) -> tuple[dict[str, float], list[Claim]]:
    """Combine seeds of one recipe.

    Returns:
        The CORE of each run. Claims on the recipe: on these questions, which all seeds answered, and on such
        questions, where the scores say the error that the questions give one run.

    Raises:
        UserError: fewer than two, one twice, one not scored, or scored on different questions.
    """
    if len(runs) < 2 or len(set(runs)) < len(runs):
        raise UserError(f"--combine {' '.join(runs)}: expected two or more different runs.")
    scored = [Scored.read(run, with_answers=False) for run in runs]
    _require_same(scored)
    values = {one.run: float(one.scores["core_metric"]) for one in scored}
    scores = scored[0].scores
    comparable = scores["core_variant"] == "nanochat" and is_core(scores["tasks"])
    claims = [_claim("mean and standard error on these questions, by the spread", values, 0.0, comparable)]
    errors = [one.scores["core_stderr"] for one in scored if one.scores.get("core_stderr") is not None]
    if len(errors) == len(scored):
        questions = statistics.fmean(errors)
        claims.append(_claim("with the error of the questions, mean", values, questions, comparable))
    return values, claims


def _claim(what: str, values: Mapping[str, float], questions: float, comparable: bool) -> Claim:
    """The error of the mean from the spread of the values, and the standard error that the questions give."""
    mean = statistics.fmean(values.values())
    spread = statistics.variance(values.values()) / len(values)
    known = questions**2 + GPT2_CORE_STDERR**2
    degrees = core_statistics.degrees_of_sum(spread, known, len(values) - 1)
    above = core_statistics.probability_above(mean, math.sqrt(spread + known), GPT2_CORE, degrees)
    verdict = describe_probability(above) if comparable else ""
    return Claim(what, mean, math.sqrt(spread + questions**2), verdict)
