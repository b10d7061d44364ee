"""report.html: what a run was, what came of it and on which machine, in one file that needs nothing else.

Made from the files of a run, so it can be made again at any time: `python -m scripts.report --run d12`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from nanochat.common import charts, files, run_files
from nanochat.common.charts import Series
from nanochat.common.errors import UserError
from nanochat.evaluation.core.results import GPT2_ACCURACY, centre, is_core, verdict

TABLE_ROWS = 25  # of a curve, where it cannot be drawn

CSS = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 0.3rem; } p.note { opacity: 0.75; margin-top: 0.3rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 0.15rem 1.2rem 0.15rem 0; border-bottom: 1px solid var(--line); }
td.n, th.n { text-align: right; } td { overflow-wrap: anywhere; }
.cards { display: flex; flex-wrap: wrap; gap: 0.8rem; margin: 1.2rem 0; }
.card { border: 1px solid var(--line); border-radius: 0.4rem; padding: 0.5rem 0.9rem; min-width: 8.5rem; }
.card b { display: block; font-size: 1.35rem; } .card span { opacity: 0.75; font-size: 0.85rem; }
.pair { display: flex; flex-wrap: wrap; } svg { max-width: 100%; height: auto; }
svg text { font-family: system-ui, sans-serif !important; }
pre { white-space: pre-wrap; background: var(--soft); padding: 0.6rem 0.9rem; border-radius: 0.4rem; }
"""


@dataclass(frozen=True)
class RunFiles:
    """What a run has left so far.

    Attributes:
        run: its name.
        config: what was asked and all that was derived.
        metrics: the lines of metrics.jsonl.
        summary: the end of training; empty before it, and where its file is damaged.
        scores: base_eval.json; empty where it was not scored.
        predictions: the lines of core_predictions.jsonl, one an example.
        notes: what was left out and why, a sentence each.
    """

    run: str
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    summary: dict[str, Any]
    scores: dict[str, Any]
    predictions: list[dict[str, Any]]
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
            notes=tuple(notes),
        )

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """The metrics of one kind, in order."""
        return [entry for entry in self.metrics if entry.get("kind") == kind]

    def curve(self, kind: str, name: str, label: str) -> Series:
        """A metric over millions of training tokens, without what is not a finite number."""
        batch_tokens = self.config["batch_tokens"]
        points = [
            (entry.get("tokens", entry["step"] * batch_tokens) / 1e6, entry[name])
            for entry in self.of_kind(kind)
            if isinstance(entry.get(name), int | float) and math.isfinite(entry[name])
        ]
        return Series(label, [x for x, _ in points], [y for _, y in points])


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


def render(found: RunFiles) -> str:
    """The page."""
    sections = (
        _headline(found),
        _training(found),
        _core(found),
        _samples(found),
        _configuration(found),
    )
    title = escape(f"nanochat: {found.run}")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{CSS}</style>
</head>
<body>
<h1>{title}</h1>
{"".join(f'<p class="note">{escape(note)}</p>' for note in found.notes)}
{"".join(sections)}
</body>
</html>
"""


def number(value: Any, form: str = ".4f", factor: float = 1.0, unit: str = "") -> str:
    """A number as it is shown; a dash for what is not known.

    >>> number(0.5), number(None), number(0.25, ".1f", 100, "%"), number(1234567, ",")
    ('0.5000', '-', '25.0%', '1,234,567')
    """
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "-"
    return f"{value if factor == 1 else value * factor:{form}}{unit}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], first_number: int = 1) -> str:
    """A table of plain text, escaped here; columns from `first_number` on are right-aligned."""

    def line(cells: Sequence[str], tag: str) -> str:
        marked = [' class="n"' if place >= first_number else "" for place in range(len(cells))]
        inside = "".join(
            f"<{tag}{mark}>{escape(cell)}</{tag}>" for cell, mark in zip(cells, marked, strict=True)
        )
        return f"<tr>{inside}</tr>\n"

    body = "".join(line(row, "td") for row in rows)
    return f"<table>\n<thead>{line(head, 'th')}</thead>\n<tbody>{body}</tbody>\n</table>\n"


def _headline(found: RunFiles) -> str:
    """What a person looks for first."""
    summary, scores, model = found.summary, found.scores, found.config["model"]
    cards = [
        (number(summary.get("val_bpb")), "validation, bits per byte"),
        (number(summary.get("min_val_bpb")), "lowest validation, bits per byte"),
        (number(summary.get("tokens"), ".1f", 1e-6, " M"), "tokens trained on"),
        (number(sum(found.config["params"].values()), ".1f", 1e-6, " M"), "parameters"),
        (number(summary.get("train_seconds"), ".1f", 1 / 60, " min"), "in training steps"),
        (number(summary.get("tokens_per_second"), ",.0f"), "tokens per second"),
        (number(summary.get("mfu"), ".1f", 100, "%"), "of the peak (MFU)"),
        (number(summary.get("peak_memory_bytes"), ".2f", 1e-9, " GB"), "peak memory of a rank"),
    ]
    if scores.get("core_metric") is not None:
        value = f"{number(scores['core_metric'])} \u00b1 {number(scores.get('core_stderr'))}"
        cards.insert(0, (value, f"CORE ({scores.get('bundle', 'unnamed bundle')})"))
    boxes = "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(what)}</span></div>' for value, what in cards
    )
    shape = (
        f"Depth {model['n_layer']}, width {model['n_embd']}, context {model['sequence_len']}, "
        f"vocabulary {model['vocab_size']:,}; corpus {found.config['args'].get('corpus')}; {_status(found)}."
    )
    return f'<p class="note">{escape(shape)}</p>\n<div class="cards">{boxes}</div>\n'


def _status(found: RunFiles) -> str:
    done, planned = found.summary.get("steps"), found.config["steps"]
    if not found.summary:
        steps = [entry["step"] + 1 for entry in found.of_kind("step")]
        return f"not at its end yet, {max(steps, default=0):,} of {planned:,} steps logged"
    return f"{found.summary['status']} after {done:,} of {planned:,} steps"


def _training(found: RunFiles) -> str:
    """Curves over tokens."""
    x_label = "million tokens"
    smoothed = found.curve("step", "smoothed_loss", "smoothed")
    loss = [found.curve("step", "loss", "training loss"), smoothed]
    parts = [
        "<h2>Training</h2>\n",
        _chart("loss", "Training loss", loss, x_label, "nats per token"),
        _chart("bpb", "Validation", [found.curve("eval", "val_bpb", "validation")], x_label, "bits per byte"),
    ]
    if found.of_kind("core"):
        core = [found.curve("core", "core_metric", "CORE")]
        parts.append(_chart("core-curve", "CORE while training", core, x_label, "CORE"))
    if charts.available():
        small = (
            ("lr", "Learning rate of the matrices", "learning rate"),
            ("tokens_per_second", "Throughput", "tokens per second"),
            ("grad_norm", "Gradient norm", "norm"),
        )
        drawn = (
            _chart(f"small-{name}", title, [found.curve("step", name, title)], x_label, label, small=True)
            for name, title, label in small
        )
        parts.append(f'<div class="pair">{"".join(f"<div>{chart}</div>" for chart in drawn)}</div>\n')
    else:
        parts.append(
            '<p class="note">For plots instead of tables: pip install "nanochat[plots]" (matplotlib), then '
            f"python -m scripts.report --run {escape(found.run)}</p>\n"
        )
    return "".join(parts)


def _chart(
    name: str, title: str, curves: Sequence[Series], x_label: str, y_label: str, *, small: bool = False
) -> str:
    """Curves with a heading: drawn where matplotlib is there, else as a table."""
    heading = f"<h3>{escape(title)}</h3>\n"
    if not any(len(curve.x) for curve in curves):
        return f'{heading}<p class="note">Nothing measured.</p>\n'
    if charts.available():
        return heading + charts.line_chart(name, curves, x_label, y_label, small=small)
    head = [x_label, *(f"{curve.name}, {y_label}" for curve in curves)]
    columns = [dict(zip(curve.x, curve.y, strict=True)) for curve in curves]
    rows = [
        [number(x, ".2f"), *(number(column.get(x)) for column in columns)]
        for x in curves[0].thinned(TABLE_ROWS).x
    ]
    return heading + table(head, rows, first_number=0)


def _core(found: RunFiles) -> str:
    """Scores by task with their errors, and bits per byte of both splits."""
    scores = found.scores
    if not scores:
        note = f"Not scored yet: python -m scripts.base_eval --run {found.run}"
        return f'<h2>Scores</h2>\n<p class="note">{escape(note)}</p>\n'
    parts = ["<h2>Scores</h2>\n"]
    bpb = scores.get("bpb") or {}
    if bpb:
        parts.append(
            table(["split", "bits per byte"], [[name, number(value)] for name, value in bpb.items()])
        )
        parts.append(_bpb_charts(scores.get("bpb_profile") or {}))
    tasks = scores.get("tasks") or {}
    if tasks:
        parts.append(f"<h3>CORE by task ({escape(str(scores.get('bundle', 'unnamed bundle')))})</h3>\n")
        parts.append(f"<p>{escape(_core_sentence(scores))}</p>\n")
        if charts.available():
            parts.append(_core_chart(tasks))
        parts.append(_task_table(tasks, _commonest_answers(found.predictions)))
        parts.append(_controls_table(tasks))
    return "".join(parts)


def _bpb_charts(profiles: dict[str, Any]) -> str:
    """Bits per byte by the place in a row, and their distribution over documents."""
    by_place, by_document = [], []
    for split, profile in profiles.items():
        places = [place for place in profile["positions"] if len(place) == 3 and place[0] > 0]
        by_place.append(Series(split, [math.log2(first) for first, _, _ in places], [p[2] for p in places]))
        step, counts = profile["documents_step"], profile["documents"]
        shares = [count / max(1, sum(counts)) for count in counts]
        by_document.append(Series(split, [step * (place + 0.5) for place in range(len(counts))], shares))
    if not by_place:
        return ""
    place_label = "log2 of the place in the row, each point up to the next"
    return _chart("bpb-places", "Bits per byte by position", by_place, place_label, "bits per byte") + _chart(
        "bpb-documents", "Documents by bits per byte", by_document, "bits per byte", "share"
    )


def _core_chart(tasks: dict[str, Any]) -> str:
    """Bars with the errors of this run; GPT-2's scores as marks where the suite is CORE."""
    baselines = [task.get("baseline", 0.0) for task in tasks.values()]
    values = [task["centered"] for task in tasks.values()]
    spread = [
        task["stderr"] / (1 - baseline) for task, baseline in zip(tasks.values(), baselines, strict=True)
    ]
    marks = {}
    if is_core(tasks):
        for place, name in enumerate(("GPT-2 124M", "GPT-2 1558M")):
            marks[name] = [
                centre(GPT2_ACCURACY[label][place], 100 * baseline)
                for label, baseline in zip(tasks, baselines, strict=True)
            ]
    label = "centered accuracy: 0 is random baseline, 1 is perfect; bars of one standard error"
    return charts.bar_chart("core", list(tasks), values, spread, label, marks)


def _core_sentence(scores: dict[str, Any]) -> str:
    """CORE and its error; compared to GPT-2 only where the suite is the one GPT-2's figure is of."""
    tasks, value, error = scores["tasks"], scores.get("core_metric"), scores.get("core_stderr")
    if value is None:
        missing = ", ".join(scores.get("faults") or {}) or "a task"
        return f"CORE is not reported: {missing} could not be read."
    variant = scores.get("core_variant", "nanochat")
    text = (
        f"CORE is {number(value)}, standard error {number(error)}, the mean of {len(tasks)} centered "
        f"accuracies with the prompts of {variant}{_cropped(scores)}. By the "
        f"first table of baselines it is {number(scores.get('core_v1'))}, by the corrected one "
        f"{number(scores.get('core_v2'))}."
    )
    if not is_core(tasks):
        return f"{text} This is not the suite of the published CORE figures and is not comparable to them."
    if judged := verdict(tasks, variant, value, error):
        return f"{text} This is {judged}."
    return text


def _cropped(scores: dict[str, Any]) -> str:
    """Whether prompts lost their beginning; older scores say a limit where none was cropped."""
    count = sum(task.get("cropped_prompts", 0) for task in scores["tasks"].values())
    return f", {count:,} of them cropped to their last {scores.get('crop_tokens')} tokens" if count else ""


def _commonest_answers(predictions: list[dict[str, Any]]) -> dict[str, float]:
    """By task: share of its examples that got the commonest answer. Near 1, the model does not read them."""
    answers: dict[str, Counter[int]] = {}
    for entry in predictions:
        if len(entry.get("losses", ())) > 1:
            answers.setdefault(entry["task"], Counter())[entry["answer"]] += 1
    return {task: max(counts.values()) / counts.total() for task, counts in answers.items()}


def _task_table(tasks: dict[str, Any], commonest: dict[str, float]) -> str:
    head = ["task", "type", "shots", "examples", "accuracy", "std. error", "random baseline", "centered"]
    if commonest:
        head.append("commonest answer")
    rows = []
    for label, task in tasks.items():
        percents = [number(task.get(name), ".1f", 100, "%") for name in ("accuracy", "stderr", "baseline")]
        counts = [number(task.get(name), ",") for name in ("shots", "examples")]
        row = [label, str(task.get("type", "-")), *counts, *percents, number(task.get("centered"), ".3f")]
        rows.append([*row, number(commonest.get(label), ".0f", 100, "%")] if commonest else row)
    return table(head, rows, first_number=2)


def _controls_table(tasks: dict[str, Any]) -> str:
    """What answers that need no model would score, as CORE and by task."""
    names = ("majority", "longest", "shortest")
    controls = {label: task.get("controls") or {} for label, task in tasks.items()}
    if not any(controls.values()):
        return ""

    def centered(name: str) -> float:
        # Where an answer is not defined (language modeling has no options) it scores nothing.
        values = [
            centre(controls[label][name], 100 * task.get("baseline", 0.0)) if name in controls[label] else 0.0
            for label, task in tasks.items()
        ]
        return sum(values) / len(values)

    head = ["answers without a model", "commonest answer", "longest option", "shortest option"]
    rows = [["CORE", *(number(centered(name)) for name in names)]]
    rows += [
        [label, *(number(own.get(name), ".1f", 100, "%") for name in names)]
        for label, own in controls.items()
    ]
    return "<h3>Controls</h3>\n" + table(head, rows)


def _samples(found: RunFiles) -> str:
    """What it writes: while training, the last time, and when it was scored."""
    logged = found.of_kind("sample")
    last = max((entry["step"] for entry in logged), default=0)
    texts = [entry["text"] for entry in logged if entry["step"] == last and "text" in entry]
    scored = [str(text) for text in found.scores.get("samples") or []]
    parts = ["<h2>Samples</h2>\n"]
    for heading, group in ((f"After {last:,} steps", texts), ("When it was scored", scored)):
        if group:
            parts.append(f"<h3>{heading}</h3>\n")
            parts.extend(f"<pre>{escape(text)}</pre>\n" for text in group)
    return "".join(parts) if len(parts) > 1 else ""


def _configuration(found: RunFiles) -> str:
    """The plan whole, and the machine it ran on."""
    plan = {name: value for name, value in found.config.items() if name not in ("args", "machine")}
    return "".join(
        (
            "<h2>Configuration</h2>\n<h3>What was asked</h3>\n",
            table(["argument", "value"], list(_leaves(found.config["args"])), first_number=2),
            "<details><summary>All that followed from it</summary>\n",
            table(["quantity", "value"], list(_leaves(plan)), first_number=2),
            "</details>\n<h2>Machine</h2>\n",
            table(["", "value"], list(_leaves(found.config.get("machine", {}))), first_number=2),
        )
    )


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
