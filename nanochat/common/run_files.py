"""Files of a run, as their readers need them: shapes, readers, and what helps where one is damaged.

Only what some reader relies on is named; everything else in a file is let through, also what is newer. In a
file of JSON lines, a kill may have torn a line of metrics, while of the answers none may be missing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict, cast

from nanochat.common import files, typed_json
from nanochat.common.errors import UserError


class Shape(TypedDict):
    """The shape of a model, as far as it is shown."""

    n_layer: int
    n_embd: int
    sequence_len: int
    vocab_size: int


class Finetune(TypedDict):
    """What SFT or RL begins with."""

    stage: str
    base: str
    base_step: int


class Stages(TypedDict, total=False):
    """What config.json of an older version lacks."""

    finetune: Finetune | None


class Config(Stages):
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


class Mean(TypedDict):
    """A mean of centered accuracies, as ChatCORE is."""

    value: float
    stderr: float


class ChatTask(TypedDict):
    """The scores of a chat task; null where it could not be judged."""

    examples: int
    unjudged: int
    baseline: float
    accuracy: float | None
    stderr: float | None
    centered: float | None
    commonest: float | None


class ChatScores(TypedDict):
    """chat_eval.json."""

    step: int
    settings: dict[str, Any]
    tasks: dict[str, ChatTask]
    means: dict[str, Mean | None]
    answers_sha256: str


class Part(TypedDict):
    """A part of a reply."""

    type: str
    text: str


class ChatAnswer(TypedDict):
    """A line of chat_answers.jsonl: one reply to one item.

    Attributes:
        task: name of the task.
        id: of the item, the same in every run.
        sample: number of the reply among those to the item.
        judge: how it was judged.
        prompt: what was asked.
        reply: its parts.
        right: the verdict; None where there was none.
        sampled: tokens that the model chose; those that a tool forced are not among them.
        reason: why the reply ended; "context" with an empty reply where the prompt was too long to be asked.
    """

    task: str
    id: str
    sample: int
    judge: str
    prompt: str
    reply: list[Part]
    right: bool | None
    sampled: int
    reason: str


class Measured(TypedDict, total=False):
    """What lines of some kinds have."""

    tokens: float
    text: str
    source: str
    scores: dict[str, float]


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
    advice = "Delete it and summary.json, then go on with the run by --resume=auto, which makes both again."
    return _read(run, "config.json", Config, advice)


def read_summary(run: str) -> dict[str, Any]:
    """summary.json of a run.

    Raises:
        UserError: it is absent or damaged.
    """
    advice = "Delete it, then go on with the run by --resume=auto, which makes it again."
    return _read(run, "summary.json", Summary, advice)


def read_scores(run: str) -> dict[str, Any]:
    """base_eval.json of a run.

    Raises:
        UserError: it is absent or damaged.
    """
    advice = f"Delete it, then score the run again: python -m scripts.base_eval --run {run}"
    scores = _read(run, "base_eval.json", Scores, advice)
    for label, task in (scores.get("tasks") or {}).items():
        if not 0 <= (baseline := task.get("baseline", 0)) < 1:
            where = files.run_dir(run) / "base_eval.json"
            raise UserError(f"{where}: task {label}: baseline {baseline}, expected a share below 1. {advice}")
    return scores


def read_chat_scores(run: str) -> dict[str, Any]:
    """chat_eval.json of a run.

    Raises:
        UserError: it is absent or damaged.
    """
    again = f"python -m scripts.chat_eval --run {run}"
    if not (path := files.run_dir(run) / "chat_eval.json").is_file():
        raise UserError(f"run {run!r}: there is no {path}. Score it: {again}")
    return _read(run, path.name, ChatScores, f"Delete it, then score the run again: {again}")


def read_chat_answers(run: str) -> tuple[dict[str, Any], list[ChatAnswer]]:
    """chat_eval.json of a run, and the lines of chat_answers.jsonl that its scores are made of.

    Raises:
        UserError: a file is absent or damaged.
    """
    scores, path = read_chat_scores(run), files.run_dir(run) / "chat_answers.jsonl"
    lines = read_lines(path, ChatAnswer)
    # Two files cannot be renamed as one: a kill between them leaves answers of another scoring.
    if not lines or files.sha256(path) != scores["answers_sha256"]:
        again = f"Score it again: python -m scripts.chat_eval --run {run}"
        raise UserError(f"{path}: these are not the answers that chat_eval.json is of. {again}")
    return scores, cast(list[ChatAnswer], lines)


def _read(run: str, name: str, shape: Any, advice: str) -> dict[str, Any]:
    values: dict[str, Any] = files.read_json(files.run_dir(run) / name, shape, advice=advice)
    return values


def read_lines(path: Path, shape: Any, notes: list[str] | None = None) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, in order; an absent file has none.

    Args:
        path: the file.
        shape: of each object.
        notes: gets how many lines do not have the shape and are left out; without it, none may be missing.

    Raises:
        UserError: the file cannot be read, or there is a line that may not be left out.
    """
    if not path.is_file():
        return []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from None
    entries = [_entry(line, shape) for line in lines]
    if notes is None and None in entries:
        number = entries.index(None) + 1
        raise UserError(f"{path}, line {number}: not a JSON object. The file is damaged; make it again.")
    good = [entry for entry in entries if entry is not None]
    left_out = sum(1 for line in lines if line.strip()) - len(good)
    if notes is not None and left_out:
        notes.append(f"Left out: {left_out:,} lines of {path}, which are damaged or not of its kind.")
    return good


def _entry(line: bytes, shape: Any) -> dict[str, Any] | None:
    """The object that a line holds; None for a line that is torn, or holds something else."""
    try:
        entry = typed_json.parse(line, allow_nan=True)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and not typed_json.mismatch(entry, shape) else None


def cut_back(path: Path, step: int) -> None:
    """Drop the lines of metrics.jsonl from `step` on, and what a kill or a crash left of others."""
    if not path.exists():
        return
    lines = ((line, _entry(line, MetricsLine)) for line in path.read_bytes().splitlines())
    kept = [line + b"\n" for line, entry in lines if entry and entry["step"] < step]
    files.atomic_write(path, b"".join(kept))


def keep_aside(path: Path, step: int) -> Path | None:
    """Copy metrics.jsonl to metrics.<n>.jsonl beside it, if it tells of steps from `step` on.

    For a run that will not go over these steps as it did: they stay as the only trace of work that was done.
    """
    entries = read_lines(path, MetricsLine, [])
    if not any(entry["kind"] == "step" and entry["step"] >= step for entry in entries):
        return None
    number = 1
    while (copy := path.with_name(f"metrics.{number}.jsonl")).exists():
        number += 1
    files.atomic_write(copy, path.read_bytes())
    return copy
