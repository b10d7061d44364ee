"""Runs against each other: the paired difference of two by example, and the mean of several seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanochat import core_stats, files, runlog
from nanochat.core_results import GPT2_CORE, describe_probability, is_core
from nanochat.core_stats import Stratum
from nanochat.errors import UserError

# What must be the same for two scores to be about the same questions.
SAME = ("core_variant", "bundle", "max_per_task", "crop_tokens")


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
    """

    name: str
    first: float
    second: float
    stderr: float
    pairs: int
    only_first: int
    only_second: int

    @property
    def p_value(self) -> float:
        """How often so large a difference, of either sign, would come of equals (normal approximation)."""
        if self.stderr == 0:
            return 1.0 if self.first == self.second else 0.0
        return 2 * core_stats.normal_cdf(-abs(self.second - self.first) / self.stderr)


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
        if not (folder / "base_eval.json").is_file():
            raise UserError(f"run {run!r}: there is no {folder / 'base_eval.json'}. {again}")
        scores = files.read_json(folder / "base_eval.json")
        if scores.get("core_metric") is None or "core_variant" not in scores:
            raise UserError(f"{folder / 'base_eval.json'}: holds no CORE of this version. {again}")
        lines: list[dict[str, Any]] = []
        if with_answers:
            path = folder / "core_predictions.jsonl"
            lines = runlog.read_lines(path) if path.is_file() else []
            if not lines or any("passage" not in line for line in lines):
                raise UserError(f"{path}: holds no answers of this version. {again}")
        return Scored(run, scores, {(line["task"], line["line"]): line for line in lines})


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
            if first.scores.get(name) != other.scores.get(name):
                raise UserError(
                    f"run {other.run!r} was scored with {name}={other.scores.get(name)}, run {first.run!r} "
                    f"with {first.scores.get(name)}. Score both alike."
                )
        if first.scores["tasks"].keys() != other.scores["tasks"].keys():
            raise UserError(f"runs {first.run!r} and {other.run!r} were scored on different tasks.")


def _task_difference(label: str, pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> Difference:
    right = [(one["answer"] == one["gold"], two["answer"] == two["gold"]) for one, two in pairs]
    groups: dict[str, list[int]] = {}
    for place, (one, _) in enumerate(pairs):
        groups.setdefault(one.get("category", ""), []).append(place)
    strata, means = [], []
    for places in groups.values():
        passages = [pairs[place][0]["passage"] for place in places]
        strata.append(Stratum.of([float(right[place][1]) - right[place][0] for place in places], passages))
        means.append([sum(right[place][side] for place in places) / len(places) for side in (0, 1)])
    first, second = (sum(mean[side] for mean in means) / len(means) for side in (0, 1))
    only = [sum(pair == sign for pair in right) for sign in ((True, False), (False, True))]
    return Difference(label, first, second, core_stats.stderr_of_mean(strata), len(pairs), *only)


@dataclass(frozen=True)
class Combined:
    """Several seeds of one recipe.

    Attributes:
        runs: their names.
        values: their CORE.
        mean: of these.
        stderr: of the mean, from the spread between the runs.
        comparable: whether GPT-2's figure is about the same questions.
    """

    runs: tuple[str, ...]
    values: tuple[float, ...]
    mean: float
    stderr: float
    comparable: bool

    @property
    def verdict(self) -> str:
        """The verdict on GPT-2's figure, by Student's distribution; empty where it is not comparable."""
        if not self.comparable:
            return ""
        degrees = len(self.values) - 1
        return describe_probability(core_stats.probability_above(self.mean, self.stderr, GPT2_CORE, degrees))


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
    mean, stderr = core_stats.mean_and_stderr(values)
    scores = found[0].scores
    comparable = scores["core_variant"] == "nanochat" and is_core(scores["tasks"])
    return Combined(tuple(runs), values, mean, stderr, comparable)
