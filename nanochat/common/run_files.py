"""The files that a run leaves, as their readers need them: shapes, and what helps where one is damaged.

Only what some reader relies on is named; everything else in a file is let through, also what is newer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict

from nanochat.common import files, jsonl, typed_json
from nanochat.common.errors import UserError


class Shape(TypedDict):
    """The shape of a model, as far as it is shown."""

    n_layer: int
    n_embd: int
    sequence_len: int
    vocab_size: int


class Config(TypedDict):
    """config.json: what was asked and all that followed from it."""

    args: dict[str, Any]
    model: Shape
    params: dict[str, int]
    batch_tokens: int
    steps: int


class Figures(TypedDict, total=False):
    """What summary.json may lack: an older version did not write it, or there was no validation."""

    val_bpb: float | None
    min_val_bpb: float | None
    val_loss: float | None
    tokens: int
    train_seconds: float
    tokens_per_second: float
    peak_memory_bytes: int


class Summary(Figures):
    """summary.json: the end of training."""

    status: str
    steps: int


class TaskFigures(TypedDict, total=False):
    """What the scores of a task may lack."""

    accuracy: float
    baseline: float
    examples: int
    controls: dict[str, float]


class Task(TaskFigures):
    """The scores of a task of CORE."""

    centered: float
    stderr: float


class Profile(TypedDict):
    """Bits per byte over the places of a row, and over documents."""

    positions: list[list[float]]
    documents: list[int]
    documents_step: float


class Scores(TypedDict, total=False):
    """base_eval.json."""

    core_metric: float | None
    core_stderr: float | None
    core_variant: str
    bundle: str
    tasks: dict[str, Task] | None
    faults: dict[str, Any] | None
    bpb: dict[str, float | None] | None
    bpb_profile: dict[str, Profile] | None
    samples: list[str] | None


class Measured(TypedDict, total=False):
    """What lines of some kinds have."""

    tokens: float
    text: str


class MetricsLine(Measured):
    """A line of metrics.jsonl."""

    kind: str
    step: int


class AnswerLine(TypedDict):
    """A line of core_predictions.jsonl."""

    task: str
    answer: int
    losses: list[float]


def read_config(run: str) -> dict[str, Any]:
    """config.json of a run.

    Raises:
        UserError: it is absent or damaged.
    """
    path = files.run_dir(run) / "config.json"
    advice = "Delete it and summary.json, then go on with the run by --resume=auto, which makes both again."
    config: dict[str, Any] = files.read_json(path, Config, advice=advice)
    return config


def read_summary(run: str) -> dict[str, Any]:
    """summary.json of a run.

    Raises:
        UserError: it is absent or damaged.
    """
    advice = "Delete it, then go on with the run by --resume=auto, which makes it again."
    summary: dict[str, Any] = files.read_json(files.run_dir(run) / "summary.json", Summary, advice=advice)
    return summary


def read_scores(run: str) -> dict[str, Any]:
    """base_eval.json of a run.

    Raises:
        UserError: it is absent or damaged.
    """
    path = files.run_dir(run) / "base_eval.json"
    advice = f"Delete it, then score the run again: python -m scripts.base_eval --run {run}"
    scores: dict[str, Any] = files.read_json(path, Scores, advice=advice)
    for label, task in (scores.get("tasks") or {}).items():
        if not 0 <= task.get("baseline", 0) < 1:
            raise UserError(
                f"{path}: task {label}: baseline {task['baseline']}, expected a share below 1. {advice}"
            )
    return scores


def read_lines(path: Path, shape: Any, notes: list[str]) -> list[dict[str, Any]]:
    """The lines of a file that have a shape; how many have not is noted. An absent file has none."""
    if not path.is_file():
        return []
    entries, damaged = jsonl.read_objects(path)
    good = [entry for entry in entries if not typed_json.mismatch(entry, shape)]
    if left_out := damaged + len(entries) - len(good):
        notes.append(f"Left out: {left_out:,} lines of {path}, which are damaged or not of its kind.")
    return good
