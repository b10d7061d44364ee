"""Bundles of CORE tasks: read and checked. Pure text, no model.

A bundle is a folder or a zip file with `core.yaml` (the tasks), `eval_meta_data.csv` (the random baselines)
and `eval_data/*.jsonl` (the examples).
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from nanochat.common import archives, typed_json
from nanochat.common.errors import UserError
from nanochat.common.typed_json import shown

MULTIPLE_CHOICE = "multiple_choice"
SCHEMA = "schema"
LANGUAGE_MODELING = "language_modeling"

LIST, BASELINES = "core.yaml", "eval_meta_data.csv"
MAX_LIST_BYTES = 1 << 15  # of each of these; the public ones have 4 kB and 7 kB
MAX_TASK_BYTES = 1 << 28  # the largest file of the public bundle has 19 MB
MAX_LINE_BYTES = 1 << 21  # an example; those of the public bundle have up to 30 kB
MAX_SHOTS = 1000  # CORE's most are 10; every shot stands in every prompt
FETCH_AGAIN = "Fetch the bundle again."

# The fields of an entry of core.yaml besides its label, and of a line of a task's file: the contexts, the
# continuations, and which of the options is right.
ENTRY: dict[str, Any] = {"icl_task_type": str, "dataset_uri": str, "num_fewshot": int | list[int]}
ENTRY |= {"continuation_delimiter": str, "has_categories": bool}
LINE: dict[str, dict[str, Any]] = {
    MULTIPLE_CHOICE: {"query": str, "choices": list[str], "gold": int},
    SCHEMA: {"context_options": list[str], "continuation": str, "gold": int},
    LANGUAGE_MODELING: {"context": str, "continuation": str},
}


@dataclass(frozen=True)
class Bundle:
    """A named set of task files, wherever they lie.

    Attributes:
        name: what errors and result files call it.
        pieces: the bytes of a file by its path inside the bundle; a `UserError` where there is none.
    """

    name: str
    pieces: Callable[[str], Iterable[bytes]]

    def sha256(self, member: str) -> str:
        """Hex digest of a file: two bundles have the same questions where those of their files are equal."""
        digest = hashlib.sha256()
        for piece in self.pieces(member):
            digest.update(piece)
        return digest.hexdigest()

    def text(self, member: str) -> str:
        """The UTF-8 text of a small file, without a byte order mark.

        Raises:
            UserError: the file is missing or is not UTF-8.
        """
        try:
            return b"".join(self.pieces(member)).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.name}/{member}: byte {error.start} is not UTF-8. {FETCH_AGAIN}"
            ) from error

    def lines(self, member: str) -> Iterator[tuple[int, bytes]]:
        """The lines of a file with their numbers from 1; only the one that is read is held.

        Only a newline ends a line: texts may hold other characters that str.splitlines would cut at.

        Raises:
            UserError: the file is missing, or a line is longer than any example.
        """
        number, pending = 1, b""
        for piece in self.pieces(member):
            ended = (pending + piece).split(b"\n")
            pending = ended.pop()
            yield from enumerate(ended, number)
            number += len(ended)
            if len(pending) > MAX_LINE_BYTES:
                raise UserError(f"{self.name}/{member}:{number}: the line has over {MAX_LINE_BYTES:,} bytes.")
        yield number, pending


@dataclass(frozen=True)
class Task:
    """One task of a suite.

    Attributes:
        label: its name, unique in the suite.
        kind: a key of `LINE`.
        shots: solved examples shown before the question.
        delimiter: what stands between a context and its continuation.
        member: path of the examples inside the bundle.
        baseline_percent: the random baseline, as `eval_meta_data.csv` has it.
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
        if not (path / LIST).is_file():
            raise UserError(f"{path}: no core.yaml in this folder. Give the folder of an eval bundle.")
        return Bundle(path.name, lambda member: _file_pieces(path, member))
    if not path.is_file():
        raise UserError(f"{path}: no such eval bundle. Give a folder or a zip file with --eval-bundle.")
    roots = [name[: -len(LIST)] for name in archives.members(path) if PurePosixPath(name).name == LIST]
    if len(roots) != 1:
        raise UserError(f"{path}: expected one core.yaml in it, found {len(roots)}. Is it an eval bundle?")
    return Bundle(path.name, lambda member: archives.chunks(path, roots[0] + member, _most_bytes(member)))


def _most_bytes(member: str) -> int:
    return MAX_LIST_BYTES if member in (LIST, BASELINES) else MAX_TASK_BYTES


def _missing(bundle: str, member: str) -> UserError:
    return UserError(f"{bundle}/{member}: the file is missing. {FETCH_AGAIN[:-1]}, or give another one.")


def _file_pieces(folder: Path, member: str) -> Iterator[bytes]:
    path, left = folder / member, _most_bytes(member)
    if not path.is_file():
        raise _missing(folder.name, member)
    with path.open("rb") as file:
        while piece := file.read(archives.CHUNK_BYTES):
            left -= len(piece)
            if left < 0:
                raise UserError(f"{path}: over {_most_bytes(member):,} bytes, more than any eval bundle's.")
            yield piece


def load_tasks(bundle: Bundle) -> list[Task]:
    """Read and check the task list and the baselines.

    Raises:
        UserError: naming the file and the task.
    """
    where = f"{bundle.name}/{LIST}"
    text = bundle.text(LIST)
    try:
        document = yaml.safe_load(text)
    # Not only YAMLError: a date that does not exist, a number of 5,000 digits, lists in lists without end.
    except (yaml.YAMLError, ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{where}: not valid YAML ({reason}). {FETCH_AGAIN}") from error
    entries = document.get("icl_tasks") if isinstance(document, dict) else None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{where}: expected a list of tasks under icl_tasks.")
    baselines = _load_baselines(bundle)
    tasks: dict[str, Task] = {}
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or not isinstance(entry.get("label"), str):
            raise UserError(f"{where}: task {number} has no label.")
        label = shown(entry["label"])
        if entry["label"] in tasks:
            raise UserError(f"{where}: the label {label} stands there twice. Labels must be unique.")
        tasks[entry["label"]] = _parse_task(f"{where}: task {label}", entry, baselines)
    return list(tasks.values())


def _parse_task(where: str, entry: dict[str, Any], baselines: Mapping[str, float]) -> Task:
    entry = {"continuation_delimiter": " ", "has_categories": False, **entry}
    if problem := _mismatch(entry, ENTRY):
        raise UserError(f"{where}: {problem}.")
    kind, uri, shots, delimiter, has_categories = (entry[name] for name in ENTRY)
    shots = shots[0] if isinstance(shots, list) and len(shots) == 1 else shots
    if kind not in LINE:
        problem = f"icl_task_type is {shown(kind)}, expected one of {', '.join(LINE)}"
    elif not archives.is_inside(uri):
        problem = f"dataset_uri is {shown(uri)}, expected a path inside eval_data"
    elif isinstance(shots, list) or not 0 <= shots <= MAX_SHOTS:
        problem = f"num_fewshot is {shown(shots)}, expected a list of one number, 0 to {MAX_SHOTS}"
    elif entry["label"] not in baselines:
        problem = "eval_meta_data.csv has no random baseline for it"
    else:
        baseline = baselines[entry["label"]]
        return Task(entry["label"], kind, shots, delimiter, f"eval_data/{uri}", baseline, has_categories)
    raise UserError(f"{where}: {problem}.")


def _mismatch(record: Any, fields: Mapping[str, Any]) -> str:
    """The first field that is not what it should be, in words, or "" where all are."""
    if problem := typed_json.mismatch(record, dict):
        return problem
    return next(
        filter(None, (typed_json.mismatch(record.get(name), fields[name], name) for name in fields)), ""
    )


def _load_baselines(bundle: Bundle) -> dict[str, float]:
    where = f"{bundle.name}/{BASELINES}"
    reader = csv.DictReader(io.StringIO(bundle.text(BASELINES), newline=""))
    baselines: dict[str, float] = {}
    try:
        for row in reader:
            label, text = row.get("Eval Task"), row.get("Random baseline")
            try:
                value = float(text or "")
            except ValueError:
                value = math.nan
            if not label or not 0 <= value < 100:
                raise UserError(
                    f"{where}:{reader.line_num}: the random baseline of {label!r:.60} is {text!r:.60}, "
                    "expected a percentage, 0 or more and under 100."
                )
            baselines[label] = value
    except csv.Error as error:
        raise UserError(f"{where}:{reader.line_num}: not a table ({error}). {FETCH_AGAIN}") from error
    return baselines


def load_examples(bundle: Bundle, task: Task) -> list[Example]:
    """Read and check all examples of a task, in the order of the file. Texts are kept exactly as they are.

    Raises:
        UserError: naming the file and the line.
    """
    examples = []
    for number, line in bundle.lines(task.member):
        if not line.strip():
            continue
        where = f"{bundle.name}/{task.member}:{number}"
        try:
            record = typed_json.parse(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except ValueError as error:
            raise UserError(f"{where}: not valid JSON ({error}). Is the file cut?") from error
        examples.append(_parse_example(where, task, record, number))
    if not examples:
        raise UserError(f"{bundle.name}/{task.member}: holds no examples.")
    return examples


def _parse_example(where: str, task: Task, record: Any, line: int) -> Example:
    fields = LINE[task.kind] | ({"category": str} if task.has_categories else {})
    if problem := _mismatch(record, fields):
        raise UserError(f"{where}: {problem}.")
    values = [record[name] for name in fields]
    contexts, continuations = (tuple(text if isinstance(text, list) else [text]) for text in values[:2])
    for name, texts in zip(fields, (contexts, continuations), strict=False):
        # What comes before all options alike may be empty.
        if name not in ("query", "context") and not (texts and all(text.strip() for text in texts)):
            raise UserError(f"{where}: {name} is empty, or a text in it is; there is nothing to score.")
    gold = record["gold"] if "gold" in fields else 0
    example = Example(contexts, continuations, gold, line, record["category"] if task.has_categories else "")
    if not 0 <= gold < example.options:
        raise UserError(f"{where}: gold is {gold}, expected a number from 0 to {example.options - 1}.")
    return example


def trivial_baselines(examples: Sequence[Example]) -> dict[str, float]:
    """Accuracies of answers that need no model: the commonest one, the longest and the shortest option.

    Of language modeling the commonest continuation, and no more.
    """
    options = [max(example.contexts, example.continuations, key=len) for example in examples]
    if max(map(len, options)) == 1:
        [(_, count)] = Counter(example.continuations[0].strip() for example in examples).most_common(1)
        return {"majority": count / len(examples)}
    golds = [example.gold for example in examples]
    sizes = [[len(text) for text in texts] for texts in options]
    pairs = list(zip(sizes, golds, strict=True))
    right = {
        "majority": Counter(golds).most_common(1)[0][1],
        "longest": sum(size.index(max(size)) == gold for size, gold in pairs),
        "shortest": sum(size.index(min(size)) == gold for size, gold in pairs),
    }
    return {name: count / len(examples) for name, count in right.items()}
