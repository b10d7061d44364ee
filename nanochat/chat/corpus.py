"""Named corpora of conversations: shards and a manifest, as corpora of text have, and mixtures of them.

python -m scripts.chat_data --corpus made --conversations 40000
python -m scripts.chat_data --corpus smoltalk
python -m scripts.chat_data --corpus local --files mine.jsonl --name mine
python -m scripts.chat_data --list

A shard has one column `conversation`, each of which is the JSON of a row: messages, id, source, and how a
reply is judged where it can be. The splits are train, val (held out from training) and test, of which only
the tasks are evaluated; a corpus may lack any of them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from nanochat.common import typed_json
from nanochat.common.errors import UserError
from nanochat.data.corpus import Corpus

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Row = dict[str, Any]  # a line of a corpus: {"messages": [{"role": ..., "content": ...}, ...], "id": ..., ...}

SPLITS = ("train", "val", "test")
MIXTURE_SUFFIX = ".toml"
MIXTURE_KEYS: dict[str, type[Any]] = {
    "corpus": str,
    "epochs": int,
    "split": str,
    "limit": int,
}  # of a source, and what they hold


class ChatCorpus(Corpus):
    """A verified view of a corpus of conversations."""

    holds: ClassVar[str] = "conversations"
    column: ClassVar[str] = "conversation"
    splits: ClassVar[Sequence[str]] = SPLITS
    required: ClassVar[Sequence[str]] = ()

    @staticmethod
    def make_command(name: str) -> str:
        """The command that makes a corpus of this name."""
        return f"python -m scripts.chat_data --corpus {name}"

    @property
    def repair(self) -> str:
        """The command that makes damaged shards good again."""
        return f"Repair: rm -rf '{self.folder}' && {self.make_command(self.name)}"

    def rows(self, split: str) -> Iterator[tuple[str, Row]]:
        """The rows of a split in their order, each after where it is from, for messages.

        Raises:
            UserError: a shard is damaged or absent.
        """
        for shard in self.shards:
            for group in range(shard.row_groups if shard.split == split else 0):
                for number, text in enumerate(self.read_block(shard, group)):
                    yield f"{self.path(shard)}: row group {group}, row {number}", json.loads(text)


def rows(name: str, split: str) -> Iterator[Row]:
    """The rows of a split of a corpus, in their order.

    Raises:
        UserError: there is no such corpus, it has no such split, or it is damaged.
    """
    corpus = ChatCorpus.open(name)
    require_split(corpus, split)
    return (row for _, row in corpus.rows(split))


def require_split(corpus: ChatCorpus, split: str) -> None:
    """Refuse a corpus without conversations of a split.

    Raises:
        UserError: names the splits that it has.
    """
    there = [one for one in SPLITS if any(shard.split == one for shard in corpus.shards)]
    if split not in there:
        raise UserError(
            f"corpus {corpus.name!r} has no split {split!r}, only {', '.join(there)}. Name another corpus."
        )


# -----------------------------------------------------------------------------
# Mixtures


@dataclass(frozen=True)
class Source:
    """A part of a mixture.

    Attributes:
        corpus: where its conversations are from.
        split: which of them.
        epochs: how often each of them comes in an epoch of the mixture.
        limit: how many of them at most, drawn once and for all; None for all.
    """

    corpus: ChatCorpus
    split: str = "train"
    epochs: int = 1
    limit: int | None = None


Mixture = tuple[Source, ...]


def mixture(names: Sequence[str]) -> Mixture:
    """The sources that --data names: corpora, or TOML files of mixtures, each with a table a source.

    [[source]]
    corpus = "gsm8k"
    epochs = 4       # by default 1
    split = "train"  # the default
    limit = 1000     # by default all

    Raises:
        UserError: there is no such corpus or file, an entry of it is unknown or wrong, a split is absent, or
            a corpus is named twice.
    """
    sources = []
    for name in names:
        if name.endswith(MIXTURE_SUFFIX):
            sources += _read_mixture(Path(name))
        else:
            sources.append(Source(ChatCorpus.open(name)))
    for source in sources:
        require_split(source.corpus, source.split)
    keys = [(source.corpus.name, source.split) for source in sources]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise UserError(f"corpus {twice[0]!r} is named twice. Name it once, with epochs in a mixture.")
    if not sources:
        raise UserError("--data: expected a chat corpus or a TOML file of a mixture.")
    return tuple(sources)


def _read_mixture(path: Path) -> list[Source]:
    try:
        entries = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: not a readable TOML file ({error}). See docs/chat.md.") from None
    wrong = typed_json.mismatch(entries, dict[str, list[dict[str, Any]]])
    if not wrong and set(entries) != {"source"}:
        wrong = f"it has the entries {', '.join(map(repr, entries)) or 'none'}, expected tables [[source]]"
    sources = []
    for number, entry in enumerate([] if wrong else entries["source"], 1):
        if wrong := _wrong_entry(entry):
            wrong = f"source {number}: {wrong}"
            break
        sources.append(Source(**{**entry, "corpus": ChatCorpus.open(entry["corpus"])}))
    if wrong:
        raise UserError(f"{path}: {wrong}. See docs/chat.md.")
    return sources


def _wrong_entry(entry: dict[str, Any]) -> str:
    """What is wrong with a table of a mixture; "" if nothing is."""
    for key, value in entry.items():
        if key not in MIXTURE_KEYS:
            return f"unknown key {key!r}, expected {', '.join(MIXTURE_KEYS)}"
        if type(value) is not (kind := MIXTURE_KEYS[key]) or (kind is int and value < 1):
            return f"{key} = {value!r}, expected {'a text' if kind is str else 'a number from 1'}"
    return "" if "corpus" in entry else "the key 'corpus' is missing"
