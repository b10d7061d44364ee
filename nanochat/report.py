"""report.html: plan, curves, scores, samples and machine of a run, on one page that needs no other file.

Of SFT and RL it also shows the curves of their own, the scores of the chat tasks and some conversations.

Made from the files of a run, so that it can be made again at any time: `python -m scripts.report --run d12`.
What is computed is here; the page, with its words, is report.html.jinja.
"""

from __future__ import annotations

import importlib.resources
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from nanochat.common import charts, files, run_files
from nanochat.common.charts import Series
from nanochat.common.errors import UserError
from nanochat.evaluation.core.results import centre, gpt2_accuracy, is_core, verdict

TABLE_ROWS = 25  # of a curve, where it cannot be drawn
CURVES = len(charts.COLORS)  # in a chart at most
# Metrics of a step of RL, in the words of its log and of the page.
RL_CURVES = {
    "reward": "Reward, mean of all replies",
    "reward_std": "Standard deviation of the rewards of a question",
    "frac_reward_zero_std": "Fraction of questions whose replies are all right or all wrong",
    "completions/clipped_ratio": "Fraction of replies that were cut off",
    "completions/mean_length": "Tokens of a reply",
    "tools/call_frequency": "Tool calls of a reply",
    "entropy": "Entropy, nats per token",
    "kl": "KL divergence from the beginning, nats per token",
}


@dataclass(frozen=True)
class RunFiles:
    """The files of a run, as far as there are any yet.

    Attributes:
        run: its name.
        config: config.json, the arguments and the plan that follows from them.
        metrics: the lines of metrics.jsonl.
        summary: the end of training; empty before it, and where its file is damaged.
        scores: base_eval.json; empty where it was not scored.
        predictions: the lines of core_predictions.jsonl, one an example.
        chat_scores: chat_eval.json; empty where the chat tasks were not scored.
        chat_answers: the lines of chat_answers.jsonl, one a reply.
        notes: a sentence for each file that was left out, or left out in part.
    """

    run: str
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    summary: dict[str, Any]
    scores: dict[str, Any]
    predictions: list[dict[str, Any]]
    chat_scores: dict[str, Any]
    chat_answers: list[dict[str, Any]]
    notes: tuple[str, ...] = ()

    @staticmethod
    def read(run: str) -> RunFiles:
        """Read the files of a run; those that come late may be absent.

        Raises:
            UserError: there is no such run, or a file of it is damaged.
        """
        folder = files.run_dir(run)
        if not (folder / "config.json").is_file():
            raise UserError(
                f"run {run!r}: there is no {folder / 'config.json'}. Train it first, or name another."
            )

        notes: list[str] = []
        summary: dict[str, Any] = {}
        if (folder / "summary.json").is_file():
            try:
                summary = run_files.read_summary(run)
            except UserError as error:  # all that it holds follows from other files
                notes.append(f"Left out: {error}")
        return RunFiles(
            run=run,
            config=run_files.read_config(run),
            metrics=run_files.read_lines(folder / "metrics.jsonl", run_files.MetricsLine, notes),
            summary=summary,
            scores=run_files.read_scores(run) if (folder / "base_eval.json").is_file() else {},
            predictions=run_files.read_lines(folder / "core_predictions.jsonl", run_files.AnswerLine, notes),
            chat_scores=run_files.read_chat_scores(run) if (folder / "chat_eval.json").is_file() else {},
            chat_answers=run_files.read_lines(folder / "chat_answers.jsonl", run_files.ChatAnswer, notes),
            notes=tuple(notes),
        )

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """The metrics of one kind, in order."""
        return [entry for entry in self.metrics if entry.get("kind") == kind]

    def steps_logged(self) -> int:
        """Steps until the last one that is in the metrics."""
        return max((entry["step"] + 1 for entry in self.of_kind("step")), default=0)

    def curve(self, kind: str, name: str, label: str) -> Series:
        """A metric over millions of training tokens, without the values that are not finite numbers."""
        batch_tokens = self.config["batch_tokens"]
        return _series(
            label,
            (
                (entry.get("tokens", entry["step"] * batch_tokens) / 1e6, entry.get(name))
                for entry in self.of_kind(kind)
            ),
        )

    def curves_by_step(self, kind: str, name: str, by: str = "") -> list[Series]:
        """A metric over optimizer steps; where lines have a text `by`, a curve of each of its values."""
        points: dict[str, list[tuple[float, Any]]] = {}
        for entry in self.of_kind(kind):
            points.setdefault(entry.get(by, name) if by else name, []).append(
                (entry["step"], entry.get(name))
            )
        return _drawn(points)

    def task_curves(self) -> list[Series]:
        """Accuracies of the chat tasks over optimizer steps, one curve a task."""
        points: dict[str, list[tuple[float, Any]]] = {}
        for entry in self.of_kind("chat_eval"):
            for task, accuracy in entry.get("scores", {}).items():
                points.setdefault(task, []).append((entry["step"], accuracy))
        return _drawn(points)


def _drawn(points: dict[str, list[tuple[float, Any]]]) -> list[Series]:
    """The curves that have a point, by name."""
    return [curve for label in points if (curve := _series(label, points[label])).x]


def _series(label: str, points: Iterable[tuple[float, Any]]) -> Series:
    """A curve of the points whose y is a finite number."""
    kept = [(x, y) for x, y in points if isinstance(y, int | float) and math.isfinite(y)]
    return Series(label, [x for x, _ in kept], [y for _, y in kept])


def write_report(run: str) -> Path:
    """Make runs/<run>/report.html from the run's files, in place of an earlier one.

    Args:
        run: name of the run.

    Returns:
        The path of the report.

    Raises:
        UserError: there is no such run, or a file of it is damaged.
    """
    path = files.run_dir(run) / "report.html"
    files.atomic_write(path, render(RunFiles.read(run)))
    return path


def render(run: RunFiles) -> str:
    """The page."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": number, "leaves": _leaves}
    source = importlib.resources.files("nanochat").joinpath("report.html.jinja").read_text("utf-8")
    tasks = run.scores.get("tasks") or {}
    by_position, by_document = _bpb_curves(run.scores.get("bpb_profile") or {})
    return environment.from_string(source).render(
        run=run,
        plan={name: value for name, value in run.config.items() if name not in ("args", "machine")},
        line_chart=charts.line_chart if charts.available() else None,
        curve_table=_curve_table,
        by_position=by_position,
        by_document=by_document,
        tasks=tasks,
        core_chart=_core_chart(tasks) if tasks and charts.available() else "",
        is_core=is_core(tasks),
        verdict=verdict,
        commonest_answers=_commonest_answers(run.predictions),
        trivial_core=_trivial_core,
        samples=_samples(run),
        chat_curves=_chat_curves(run),
        conversations=_conversations(run),
    )


def number(value: Any, form: str = ".4f", factor: float = 1.0, unit: str = "") -> str:
    """A number as it is shown; a dash for a value that is unknown.

    >>> number(0.5), number(None), number(0.25, ".1f", 100, "%"), number(1234567, ",")
    ('0.5000', '-', '25.0%', '1,234,567')
    """
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "-"
    return f"{value if factor == 1 else value * factor:{form}}{unit}"


def _curve_table(curves: Sequence[Series], x_label: str, y_label: str) -> list[list[str]]:
    """The head and the rows of a table that holds some points of curves."""
    columns = [dict(zip(curve.x, curve.y, strict=True)) for curve in curves]
    lines = [[x_label, *(f"{curve.name}, {y_label}" for curve in curves)]]
    for x in curves[0].thinned(TABLE_ROWS).x:
        lines.append([number(x, ".2f"), *(number(column.get(x)) for column in columns)])
    return lines


def _bpb_curves(profiles: dict[str, Any]) -> tuple[list[Series], list[Series]]:
    """Bits per byte by the position in a row, and its distribution over documents; a curve a split."""
    by_position, by_document = [], []
    for split, profile in profiles.items():
        positions = [entry for entry in profile["positions"] if len(entry) == 3 and entry[0] > 0]
        x = [math.log2(first) for first, _, _ in positions]
        by_position.append(Series(split, x, [bpb for _, _, bpb in positions]))
        step, counts = profile["documents_step"], profile["documents"]
        fractions = [count / max(1, sum(counts)) for count in counts]
        by_document.append(Series(split, [step * (i + 0.5) for i in range(len(counts))], fractions))
    return by_position, by_document


def _core_chart(tasks: dict[str, Any]) -> str:
    """Bars with the errors of this run; GPT-2's scores as marks where the suite is CORE."""
    baselines = {label: task.get("baseline", 0.0) for label, task in tasks.items()}
    errors = [task["stderr"] / (1 - baselines[label]) for label, task in tasks.items()]
    marks = {}
    if is_core(tasks):
        for model, name in enumerate(("GPT-2 124M", "GPT-2 1558M")):
            marks[name] = [centre(gpt2_accuracy()[label][model], 100 * baselines[label]) for label in tasks]
    label = "centered accuracy: 0 is the random baseline, 1 is perfect; bars of one standard error"
    return charts.bar_chart(
        "core", list(tasks), [task["centered"] for task in tasks.values()], errors, label, marks
    )


def _commonest_answers(predictions: list[dict[str, Any]]) -> dict[str, float]:
    """Fraction of a task's examples that got its commonest answer. Near 1, the model does not read them."""
    answers: dict[str, Counter[int]] = {}
    for entry in predictions:
        if len(entry.get("losses", ())) > 1:
            answers.setdefault(entry["task"], Counter())[entry["answer"]] += 1
    return {task: max(counts.values()) / counts.total() for task, counts in answers.items()}


def _trivial_core(tasks: dict[str, Any], answer: str) -> float:
    """CORE of answers that need no model; a task without them (language modeling has no options) adds 0."""
    centered = [
        centre(task["controls"][answer], 100 * task.get("baseline", 0.0))
        for task in tasks.values()
        if answer in task.get("controls", {})
    ]
    return sum(centered) / len(tasks)


def _samples(run: RunFiles) -> dict[str, list[str]]:
    """Texts by their heading: the last ones of training, and those of the scoring."""
    logged = run.of_kind("sample")
    last = max((entry["step"] for entry in logged), default=0)
    texts = [entry["text"] for entry in logged if entry["step"] == last and "text" in entry]
    groups = {f"After {last:,} steps": texts, "When it was scored": run.scores.get("samples") or []}
    return {heading: group for heading, group in groups.items() if group}


def _chat_curves(run: RunFiles) -> list[tuple[str, list[Series], str]]:
    """What SFT and RL log of themselves, over steps: title, curves and name of y of each chart."""
    found = [
        (
            "Validation on replies, by source",
            run.curves_by_step("chat_val", "bpb", "source"),
            "bits per byte",
        ),
        ("Tasks while training", run.task_curves(), "accuracy"),
    ]
    found += [(title, run.curves_by_step("step", name), name) for name, title in RL_CURVES.items()]
    return [
        (title, curves[first : first + CURVES], y_label)
        for title, curves, y_label in found
        for first in range(0, len(curves), CURVES)
    ]


def _conversations(run: RunFiles) -> dict[str, list[dict[str, Any]]]:
    """The first right and the first wrong answer of each task."""
    shown: dict[tuple[str, bool], dict[str, Any]] = {}
    for answer in run.chat_answers:
        if answer["right"] is not None:
            shown.setdefault((answer["task"], answer["right"]), answer)
    tasks = dict.fromkeys(task for task, _ in shown)
    return {
        task: [shown[task, is_right] for is_right in (True, False) if (task, is_right) in shown]
        for task in tasks
    }


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of nested dictionaries, each with its path."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        yield name, ", ".join(map(str, value))
    else:
        yield name, "-" if value is None or value == "" else str(value)


if __name__ == "__main__":  # `python -m nanochat.report` as before 0.2
    from scripts.report import main

    main()
