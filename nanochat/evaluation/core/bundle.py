"""CORE's tasks: reading and checking a bundle. Pure text, no model.

A bundle is a folder or a zip file with `core.yaml` (the tasks), `eval_meta_data.csv` (the random baselines)
and `eval_data/*.jsonl` (the examples).
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from nanochat.common import archives, typed_json
from nanochat.common.errors import UserError

MULTIPLE_CHOICE = "multiple_choice"
SCHEMA = "schema"
LANGUAGE_MODELING = "language_modeling"
KINDS = (MULTIPLE_CHOICE, SCHEMA, LANGUAGE_MODELING)

LIST, BASELINES = "core.yaml", "eval_meta_data.csv"
MAX_LIST_BYTES = 1 << 15  # of each of these; the public ones have 4 kB and 7 kB
MAX_TASK_BYTES = 1 << 28  # the largest file of the public bundle has 19 MB
MAX_LINE_BYTES = 1 << 21  # an example; those of the public bundle have up to 30 kB
MAX_SHOTS = 1000  # CORE's most are 10; every shot stands in every prompt
FETCH_AGAIN = "Fetch the bundle again."

# Values are shown short in errors: a few lines of YAML can name a list of a billion entries.
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 60, 60


@dataclass(frozen=True)
class Bundle:
    """A named set of task files, wherever they lie.

    Attributes:
        name: what errors and result files call it.
        blocks: the bytes of a file by its path inside the bundle, in pieces; `UserError` where there is none.
    """

    name: str
    blocks: Callable[[str], Iterable[bytes]]

    @staticmethod
    def from_texts(name: str, texts: Mapping[str, str]) -> Bundle:
        """A bundle held in memory."""

        def blocks(member: str) -> list[bytes]:
            if member not in texts:
                raise _missing(name, member)
            return [texts[member].encode("utf-8")]

        return Bundle(name, blocks)

    def sha256(self, member: str) -> str:
        """Hex digest of a file: two bundles ask the same where those of their files are the same."""
        digest = hashlib.sha256()
        for block in self.blocks(member):
            digest.update(block)
        return digest.hexdigest()

    def text(self, member: str) -> str:
        """The UTF-8 text of a small file, without a byte order mark.

        Raises:
            UserError: the file is missing or is not UTF-8.
        """
        try:
            return b"".join(self.blocks(member)).decode("utf-8-sig")
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
        for block in self.blocks(member):
            ended = (pending + block).split(b"\n")
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
        if not (path / LIST).is_file():
            raise UserError(f"{path}: no core.yaml in this folder. Give the folder of an eval bundle.")
        return _folder_bundle(path)
    if not path.is_file():
        raise UserError(f"{path}: no such eval bundle. Give a folder or a zip file with --eval-bundle.")
    names = archives.members(path)
    roots = [name[: -len(LIST)] for name in names if PurePosixPath(name).name == LIST]
    if len(roots) != 1:
        raise UserError(f"{path}: expected one core.yaml in it, found {len(roots)}. Is it an eval bundle?")
    return _zip_bundle(path, roots[0])


def _missing(bundle: str, member: str) -> UserError:
    return UserError(f"{bundle}/{member}: the file is missing. {FETCH_AGAIN[:-1]}, or give another one.")


def _most_bytes(member: str) -> int:
    return MAX_LIST_BYTES if member in (LIST, BASELINES) else MAX_TASK_BYTES


def _folder_bundle(folder: Path) -> Bundle:
    def blocks(member: str) -> Iterator[bytes]:
        path, left = folder / member, _most_bytes(member)
        if not path.is_file():
            raise _missing(folder.name, member)
        with path.open("rb") as file:
            while block := file.read(archives.CHUNK_BYTES):
                left -= len(block)
                if left < 0:
                    raise UserError(
                        f"{path}: over {_most_bytes(member):,} bytes, more than any eval bundle's."
                    )
                yield block

    return Bundle(folder.name, blocks)


def _zip_bundle(path: Path, root: str) -> Bundle:
    return Bundle(path.name, lambda member: archives.chunks(path, root + member, _most_bytes(member)))


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
    tasks = [_parse_task(where, number, entry, baselines) for number, entry in enumerate(entries, 1)]
    seen: set[str] = set()
    for task in tasks:
        if task.label in seen:
            raise UserError(
                f"{where}: the label {_SHORT.repr(task.label)} stands there twice. Labels must be unique."
            )
        seen.add(task.label)
    return tasks


def _parse_task(where: str, number: int, entry: Any, baselines: Mapping[str, float]) -> Task:
    if not isinstance(entry, dict) or not isinstance(entry.get("label"), str):
        raise UserError(f"{where}: task {number} has no label.")
    label = entry["label"]
    here = f"{where}: task {_SHORT.repr(label)}"
    kind, uri = entry.get("icl_task_type"), entry.get("dataset_uri")
    if not isinstance(kind, str) or kind not in KINDS:
        raise UserError(f"{here}: icl_task_type is {_SHORT.repr(kind)}, expected one of {', '.join(KINDS)}.")
    if not isinstance(uri, str) or not archives.is_inside(uri):
        raise UserError(f"{here}: dataset_uri is {_SHORT.repr(uri)}, expected a path inside eval_data.")
    shots = entry.get("num_fewshot")
    shots = shots[0] if isinstance(shots, list) and len(shots) == 1 else shots
    if type(shots) is not int or not 0 <= shots <= MAX_SHOTS:
        raise UserError(
            f"{here}: num_fewshot is {_SHORT.repr(shots)}, expected a list of one number, 0 to {MAX_SHOTS}."
        )
    delimiter = entry.get("continuation_delimiter", " ")
    if not isinstance(delimiter, str):
        raise UserError(f"{here}: continuation_delimiter is {_SHORT.repr(delimiter)}, expected a text.")
    if label not in baselines:
        raise UserError(f"{here}: eval_meta_data.csv has no random baseline for it.")
    categories = entry.get("has_categories", False)
    if type(categories) is not bool:
        raise UserError(f"{here}: has_categories is {_SHORT.repr(categories)}, expected true or false.")
    return Task(label, kind, shots, delimiter, f"eval_data/{uri}", baselines[label], categories)


def _load_baselines(bundle: Bundle) -> dict[str, float]:
    where = f"{bundle.name}/{BASELINES}"
    reader = csv.DictReader(io.StringIO(bundle.text(BASELINES), newline=""))
    baselines: dict[str, float] = {}
    try:
        for row in reader:
            label, text = row.get("Eval Task"), row.get("Random baseline")
            value = _percentage(text)
            if not label or value is None:
                raise UserError(
                    f"{where}:{reader.line_num}: the random baseline of {label!r:.60} is {text!r:.60}, "
                    "expected a percentage, 0 or more and under 100."
                )
            baselines[label] = value
    except csv.Error as error:
        raise UserError(f"{where}:{reader.line_num}: not a table ({error}). {FETCH_AGAIN}") from error
    return baselines


def _percentage(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if 0 <= value < 100 else None


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
        raise UserError(f"{where}: {key!r} is {_SHORT.repr(value)}, expected a text.")
    return value


def _field_texts(where: str, record: dict[str, Any], key: str) -> tuple[str, ...]:
    value = record.get(key)
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: {key!r} is {_SHORT.repr(value)}, expected a list of texts, not empty.")
    for number, text in enumerate(value):
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{where}: entry {number} of {key!r} is {_SHORT.repr(text)}, expected some text.")
    return tuple(value)


def _gold(where: str, record: dict[str, Any], options: int) -> int:
    gold = record.get("gold")
    if type(gold) is not int or not 0 <= gold < options:
        raise UserError(f"{where}: 'gold' is {_SHORT.repr(gold)}, expected a number from 0 to {options - 1}.")
    return gold


def trivial_baselines(examples: Sequence[Example]) -> dict[str, float]:
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
