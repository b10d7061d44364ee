"""Sources of conversations: the user's files and data sets of the hub, each read into rows of one form.

A row is {"messages": [{"role", "content"}, ...], "id", "source"}, and where a reply can be judged also
"task", "judge", "answer", and what the judge needs ("letters", "test", "entry_point", "prompt").
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.chat import conversation
from nanochat.chat.made import choice_prompt
from nanochat.chat.tools import calculate
from nanochat.common import typed_json
from nanochat.common.errors import UserError
from nanochat.data import text_files

Row = dict[str, Any]

JUDGED = ("id", "source", "task", "judge", "answer", "letters", "test", "entry_point", "prompt")
BATCH_ROWS = 256  # of a parquet file, decoded at a time
CALL = re.compile(r"<<([^<>=]*)=([^<>]*)>>")  # GSM8K: <<48/2=24>>


def checked(entries: Iterable[tuple[str, Any]], left_out: list[str] | None) -> Iterator[Row]:
    """Rows of one form from whatever `conversation.read` reads.

    Args:
        entries: where each is from, and its value, or an error in its place.
        left_out: takes what is wrong with those that cannot be used; None lets nothing be left out.

    Raises:
        UserError: a conversation cannot be used, and none may be left out.
    """
    for where, value in entries:
        try:
            if isinstance(value, UserError):
                raise value
            messages = conversation.read(value, where)
        except UserError as error:
            if left_out is None:
                raise
            left_out.append(str(error))
            continue
        contents = [{"role": message.role, "content": _content(message)} for message in messages]
        kept = {key: value[key] for key in JUDGED if value.get(key) is not None}
        yield {"messages": contents, **kept}


def _content(message: conversation.Message) -> str | list[dict[str, str]]:
    """The content of a message: a text where it is one, otherwise its parts."""
    if all(part.kind == "text" for part in message.parts):
        return "".join(part.text for part in message.parts)
    return [{"type": part.kind, "text": part.text} for part in message.parts]


def of_files(paths: Iterable[Path]) -> Iterator[tuple[str, Any]]:
    """The conversations of the user's files, one a line, or an array of them in a .json file, or parquet.

    Yields:
        file and line, and the value; a `UserError` in its place for a line that is not JSON.

    Raises:
        UserError: a file is damaged, or of another kind.
    """
    for path in paths:
        name, (kind, _) = text_files.shown(path), text_files.kind_of(path)
        if kind == text_files.PARQUET_SUFFIX:
            yield from of_parquet(path)
        elif kind == ".json":
            whole = "".join(line for _, line in text_files.json_lines(path))
            value = _parsed(name, whole)
            entries = value if isinstance(value, list) else [value]
            yield from ((f"{name}: entry {number}", entry) for number, entry in enumerate(entries, 1))
        elif kind in text_files.JSON_SUFFIXES:
            for number, line in text_files.json_lines(path):
                where = f"{name}: line {number}"
                if line.strip():
                    yield where, _parsed(where, line)
        else:
            raise UserError(f"{name}: expected conversations as .jsonl, .json or .parquet. Leave it out.")


def _parsed(where: str, text: str) -> Any:
    """The value of a JSON text, or the error that it is none."""
    try:
        return typed_json.parse(text)
    except ValueError as error:
        return UserError(
            f"{where}: not JSON ({error}). Correct it, or leave such lines out with chat_data --skip-bad."
        )


def of_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a parquet file: where each is from, and its columns by name.

    Raises:
        UserError: it is not a readable parquet file.
    """
    name, row = text_files.shown(path), 0
    try:
        with path.open("rb") as file, pq.ParquetFile(pa.PythonFile(file, "r"), pre_buffer=False) as parquet:
            for batch in parquet.iter_batches(BATCH_ROWS):
                for value in batch.to_pylist():
                    yield f"{name}: row {row}", value
                    row += 1
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{name}: not a readable parquet file ({error}). Fetch or write it again.") from None


# -----------------------------------------------------------------------------
# The hub


@dataclass(frozen=True)
class HubSet:
    """A data set of conversations or questions on the Hugging Face hub.

    Attributes:
        repo: its name there.
        folder: where its parquet files lie.
        files: for each split of ours, how the names of its files begin.
        convert: makes a row of one of theirs.
        val_every: where they have no validation split, one row in so many is held out from training, by hash.
    """

    repo: str
    folder: str
    files: Mapping[str, tuple[str, ...]]
    convert: Callable[[Row], Row]
    val_every: int = 0

    def rows(self, split: str, paths: Iterable[Path]) -> Iterator[tuple[str, Any]]:
        """The rows of files of theirs in our form: where each is from, and the row.

        Raises:
            UserError: a file is damaged, or its columns are others than this version knows.
        """
        for number, (where, theirs) in enumerate(item for path in paths for item in of_parquet(path)):
            try:
                row = self.convert(theirs)
            except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
                raise UserError(
                    f"{where}: the columns of {self.repo} are not those that this version knows ({error!r}); "
                    f"there are {', '.join(theirs)}. Look for a newer version of nanochat."
                ) from None
            yield where, {"id": f"{split}-{number}", **row}


def multiple_choice(question: str, letters: list[str], choices: list[str], right: str, task: str) -> Row:
    """A question with options, answered by a letter; the letter has no space before it, as in the reply."""
    text = choice_prompt(question, choices, letters)
    return _asked(text, right, task=task, judge="letter", answer=right, letters=letters)


def _asked(question: str, reply: str | list[dict[str, str]], **judged: Any) -> Row:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return {"messages": messages, "source": judged["task"], **judged}


def _smoltalk(row: Row) -> Row:
    return {"messages": row["messages"], "source": f"smoltalk/{row.get('source') or 'unknown'}"}


def _mmlu(row: Row) -> Row:
    letters = list("ABCD")
    return multiple_choice(row["question"], letters, row["choices"], letters[row["answer"]], "mmlu")


def _arc(task: str) -> Callable[[Row], Row]:
    def convert(row: Row) -> Row:
        choices = row["choices"]
        return multiple_choice(row["question"], choices["label"], choices["text"], row["answerKey"], task)

    return convert


def _gsm8k(row: Row) -> Row:
    """Its calculations become calls of the calculator, where that gives what stands there."""
    parts: list[dict[str, str]] = []
    end = 0
    for call in CALL.finditer(row["answer"]):
        parts.append({"type": "text", "text": row["answer"][end : call.start()]})
        result = calculate(call[1])
        if (number := _number(result)) is not None and number == _number(call[2]):
            parts.append({"type": "python", "text": call[1].strip()})
            parts.append({"type": "python_output", "text": result})
        end = call.end()
    parts.append({"type": "text", "text": row["answer"][end:]})
    answer = row["answer"].rpartition("####")[2].strip().replace(",", "")
    return _asked(row["question"], parts, task="gsm8k", judge="gsm8k", answer=answer)


def _number(text: str) -> Decimal | None:
    try:
        return Decimal(text.replace(",", "").strip())
    except InvalidOperation:
        return None


def _humaneval(row: Row) -> Row:
    program = f"```python\n{row['prompt']}{row['canonical_solution']}\n```"
    needed = {key: row[key] for key in ("prompt", "test", "entry_point")}
    judged = {"task": "humaneval", "judge": "code", "answer": row["canonical_solution"]}
    return _asked(row["prompt"], program, **judged, **needed)


_ARC_FILES = {"train": ("train",), "val": ("validation",), "test": ("test",)}
HUB_SETS = {
    "smoltalk": HubSet("HuggingFaceTB/smol-smoltalk", "data", {"train": ("train",)}, _smoltalk, 200),
    "mmlu": HubSet(
        "cais/mmlu",
        "all",
        {"train": ("auxiliary_train",), "val": ("validation", "dev"), "test": ("test",)},
        _mmlu,
    ),
    "gsm8k": HubSet("openai/gsm8k", "main", {"train": ("train",), "test": ("test",)}, _gsm8k, 20),
    "arc-easy": HubSet("allenai/ai2_arc", "ARC-Easy", _ARC_FILES, _arc("arc-easy")),
    "arc-challenge": HubSet("allenai/ai2_arc", "ARC-Challenge", _ARC_FILES, _arc("arc-challenge")),
    "humaneval": HubSet("openai/openai_humaneval", "openai_humaneval", {"test": ("test",)}, _humaneval),
}
