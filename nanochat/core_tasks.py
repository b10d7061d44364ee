"""CORE's tasks: reading and checking a bundle. Pure text, no model.

A bundle is a folder or a zip file with `core.yaml` (the tasks), `eval_meta_data.csv` (the random baselines)
and `eval_data/*.jsonl` (the examples).
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from nanochat.errors import UserError

MULTIPLE_CHOICE = "multiple_choice"
SCHEMA = "schema"
LANGUAGE_MODELING = "language_modeling"
KINDS = (MULTIPLE_CHOICE, SCHEMA, LANGUAGE_MODELING)

# The largest file of the public bundle unpacks to 19 MB; more than this is not an evaluation set.
MAX_MEMBER_BYTES = 1 << 30


@dataclass(frozen=True)
class Bundle:
    """A named set of task files, wherever they lie.

    Attributes:
        name: what errors and result files call it.
        read: bytes of a file by its path inside the bundle; `UserError` where there is none.
    """

    name: str
    read: Callable[[str], bytes]

    @staticmethod
    def from_texts(name: str, texts: Mapping[str, str]) -> Bundle:
        """A bundle held in memory."""

        def read(member: str) -> bytes:
            if member not in texts:
                raise _missing(name, member)
            return texts[member].encode("utf-8")

        return Bundle(name, read)

    def text(self, member: str) -> str:
        """The UTF-8 text of a file.

        Raises:
            UserError: the file is missing or is not UTF-8.
        """
        try:
            return self.read(member).decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.name}/{member}: byte {error.start} is not UTF-8. Fetch the bundle again."
            ) from error


@dataclass(frozen=True)
class Task:
    """One task of a suite.

    Attributes:
        label: its name, unique in the suite.
        kind: one of `KINDS`.
        shots: solved examples shown before the question.
        delimiter: what stands between a context and its continuation.
        member: path of the examples inside the bundle.
        baseline_percent: accuracy of guessing, as `eval_meta_data.csv` has it.
        has_categories: whether its examples name the category they are of.
    """

    label: str
    kind: str
    shots: int
    delimiter: str
    member: str
    baseline_percent: float
    has_categories: bool = False


@dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
        contexts: the query, the context, or (schema) the options that come first.
        continuations: the choices, or the one continuation.
        gold: index of the right option; 0 for language modeling.
        line: its line in the task's file, from 1.
        category: what it is about, where the task has categories.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int
    line: int
    category: str = ""

    @property
    def options(self) -> int:
        """How many texts are compared, or 1."""
        return len(self.contexts) * len(self.continuations)


def open_bundle(path: Path) -> Bundle:
    """Open a bundle folder or zip file; a zip is read in place and nothing is unpacked.

    Raises:
        UserError: no such file, not a zip, no `core.yaml` in it, or member paths that lead out of it.
    """
    if path.is_dir():
        if not (path / "core.yaml").is_file():
            raise UserError(f"{path}: no core.yaml in this folder. Give the folder of an eval bundle.")
        return _folder_bundle(path)
    if not path.is_file():
        raise UserError(f"{path}: no such eval bundle. Give a folder or a zip file with --eval-bundle.")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise UserError(f"{path}: not a complete zip file ({error}). Fetch it again.") from error
    unsafe = [name for name in names if not _is_inside(name)]
    if unsafe:
        raise UserError(f"{path}: its member {unsafe[0]!r} leads out of it. Do not use this file.")
    roots = [name[: -len("core.yaml")] for name in names if PurePosixPath(name).name == "core.yaml"]
    if len(roots) != 1:
        raise UserError(f"{path}: expected one core.yaml in it, found {len(roots)}. Is it an eval bundle?")
    return _zip_bundle(path, roots[0])


def _is_inside(member: str) -> bool:
    parts = PurePosixPath(member.replace("\\", "/")).parts
    return bool(parts) and ".." not in parts and parts[0] != "/" and ":" not in parts[0]


def _missing(bundle: str, member: str) -> UserError:
    return UserError(f"{bundle}/{member}: the file is missing. Fetch the bundle again, or give another one.")


def _folder_bundle(folder: Path) -> Bundle:
    def read(member: str) -> bytes:
        path = folder / member
        if not path.is_file():
            raise _missing(folder.name, member)
        return path.read_bytes()

    return Bundle(folder.name, read)


def _zip_bundle(path: Path, root: str) -> Bundle:
    def read(member: str) -> bytes:
        with zipfile.ZipFile(path) as archive:
            try:
                info = archive.getinfo(root + member)
            except KeyError:
                raise _missing(path.name, member) from None
            if info.file_size > MAX_MEMBER_BYTES:
                raise UserError(f"{path.name}/{member}: {info.file_size} bytes, over {MAX_MEMBER_BYTES}.")
            try:
                return archive.read(info)
            except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
                raise UserError(f"{path.name}/{member}: damaged ({error}). Fetch it again.") from error

    return Bundle(path.name, read)


def load_tasks(bundle: Bundle) -> list[Task]:
    """Read and check the task list and the baselines.

    Raises:
        UserError: naming the file and the task.
    """
    where = f"{bundle.name}/core.yaml"
    try:
        document = yaml.safe_load(bundle.text("core.yaml"))
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error
    entries = document.get("icl_tasks") if isinstance(document, dict) else None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{where}: expected a list of tasks under icl_tasks.")
    baselines = _load_baselines(bundle)
    tasks = [_parse_task(where, number, entry, baselines) for number, entry in enumerate(entries, 1)]
    seen: set[str] = set()
    for task in tasks:
        if task.label in seen:
            raise UserError(f"{where}: the label {task.label!r} stands there twice. Labels must be unique.")
        seen.add(task.label)
    return tasks


def _parse_task(where: str, number: int, entry: Any, baselines: Mapping[str, float]) -> Task:
    if not isinstance(entry, dict) or not isinstance(entry.get("label"), str):
        raise UserError(f"{where}: task {number} has no label.")
    label = entry["label"]
    here = f"{where}: task {label!r}"
    kind, uri = entry.get("icl_task_type"), entry.get("dataset_uri")
    if kind not in KINDS:
        raise UserError(f"{here}: icl_task_type is {kind!r}, expected one of {', '.join(KINDS)}.")
    if not isinstance(uri, str) or not _is_inside(uri):
        raise UserError(f"{here}: dataset_uri is {uri!r}, expected a path inside eval_data.")
    shots = entry.get("num_fewshot")
    shots = shots[0] if isinstance(shots, list) and len(shots) == 1 else shots
    if type(shots) is not int or shots < 0:
        raise UserError(f"{here}: num_fewshot is {shots!r}, expected a list of one number, 0 or more.")
    delimiter = entry.get("continuation_delimiter", " ")
    if not isinstance(delimiter, str):
        raise UserError(f"{here}: continuation_delimiter is {delimiter!r}, expected a text.")
    if label not in baselines:
        raise UserError(f"{here}: eval_meta_data.csv has no random baseline for it.")
    categories = entry.get("has_categories", False)
    if type(categories) is not bool:
        raise UserError(f"{here}: has_categories is {categories!r}, expected true or false.")
    return Task(label, kind, shots, delimiter, f"eval_data/{uri}", baselines[label], categories)


def _load_baselines(bundle: Bundle) -> dict[str, float]:
    where = f"{bundle.name}/eval_meta_data.csv"
    reader = csv.DictReader(io.StringIO(bundle.text("eval_meta_data.csv"), newline=""))
    baselines: dict[str, float] = {}
    for row in reader:
        label, text = row.get("Eval Task"), row.get("Random baseline")
        try:
            value = float(text or "")
        except ValueError:
            value = -1.0
        if not label or not 0 <= value < 100:
            raise UserError(
                f"{where}:{reader.line_num}: the random baseline of {label!r} is {text!r}, "
                "expected a percentage, 0 or more and under 100."
            )
        baselines[label] = value
    return baselines


def load_examples(bundle: Bundle, task: Task) -> list[Example]:
    """Read and check all examples of a task, in the order of the file. Texts are kept exactly as they are.

    Raises:
        UserError: naming the file and the line.
    """
    examples = []
    # Only \n ends a line: texts may hold other characters that str.splitlines would cut at.
    for number, line in enumerate(bundle.text(task.member).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{bundle.name}/{task.member}:{number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not valid JSON ({error.msg}). Is the file cut?") from error
        if not isinstance(record, dict):
            raise UserError(f"{where}: expected an object, found {type(record).__name__}.")
        example = _parse_example(where, task.kind, record, number)
        if task.has_categories:
            example = dataclasses.replace(example, category=_field_text(where, record, "category"))
        examples.append(example)
    if not examples:
        raise UserError(f"{bundle.name}/{task.member}: holds no examples.")
    return examples


def _parse_example(where: str, kind: str, record: dict[str, Any], line: int) -> Example:
    if kind == MULTIPLE_CHOICE:
        query, choices = _field_text(where, record, "query"), _field_texts(where, record, "choices")
        return Example((query,), choices, _gold(where, record, len(choices)), line)
    continuation = _field_text(where, record, "continuation")
    if not continuation.strip():
        raise UserError(f"{where}: the continuation is empty; there is nothing to score.")
    if kind == SCHEMA:
        options = _field_texts(where, record, "context_options")
        return Example(options, (continuation,), _gold(where, record, len(options)), line)
    return Example((_field_text(where, record, "context"),), (continuation,), 0, line)


def _field_text(where: str, record: dict[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise UserError(f"{where}: {key!r} is {value!r:.60}, expected a text.")
    return value


def _field_texts(where: str, record: dict[str, Any], key: str) -> tuple[str, ...]:
    value = record.get(key)
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: {key!r} is {value!r:.60}, expected a list of texts, not empty.")
    for number, text in enumerate(value):
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{where}: entry {number} of {key!r} is {text!r:.60}, expected some text.")
    return tuple(value)


def _gold(where: str, record: dict[str, Any], options: int) -> int:
    gold = record.get("gold")
    if type(gold) is not int or not 0 <= gold < options:
        raise UserError(f"{where}: 'gold' is {gold!r:.60}, expected a number from 0 to {options - 1}.")
    return gold


def controls(examples: Sequence[Example]) -> dict[str, float]:
    """Accuracies of answers that need no model: the commonest one, the longest and the shortest option.

    Of language modeling the commonest continuation, and no more.
    """
    options = [
        example.continuations if len(example.contexts) == 1 else example.contexts for example in examples
    ]
    if max(map(len, options)) == 1:
        [(_, count)] = Counter(texts[0].strip() for texts in options).most_common(1)
        return {"majority": count / len(examples)}
    golds = [example.gold for example in examples]
    right = {"majority": Counter(golds).most_common(1)[0][1], "longest": 0, "shortest": 0}
    for texts, gold in zip(options, golds, strict=True):
        sizes = [len(text) for text in texts]
        right["longest"] += sizes.index(max(sizes)) == gold
        right["shortest"] += sizes.index(min(sizes)) == gold
    return {name: count / len(examples) for name, count in right.items()}
