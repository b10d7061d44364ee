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

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypedDict

from nanochat.chat import made, sources
from nanochat.chat.sources import HUB_SETS, Row
from nanochat.common import files, locks, typed_json
from nanochat.common.errors import UserError
from nanochat.config.arguments import ChatDataArgs
from nanochat.data import sources as data_sources
from nanochat.data.corpus import Corpus, existing, write_corpus

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LeftOut = list[str] | None  # what is wrong with conversations that are left out; None where none may be

SPLITS = ("train", "val", "test")
MADE_VAL, MADE_VAL_SEED = 2_000, 1 << 32  # conversations, and what is added to the seed for them
MADE_TEST = 400  # items of each task
LOCAL_VAL_EVERY = 20  # one conversation in so many is held out
MIXTURE_SUFFIX = ".toml"


class ChatCorpus(Corpus):
    """A verified view of a corpus of conversations."""

    holds: ClassVar[str] = "conversations"
    column: ClassVar[str] = "conversation"
    splits: ClassVar[Sequence[str]] = SPLITS
    required: ClassVar[Sequence[str]] = ()

    @staticmethod
    def make_command(name: str) -> str:
        """The command that makes a corpus of this name."""
        known = name in ("made", *HUB_SETS)
        return (
            f"python -m scripts.chat_data --corpus {name if known else f'local --name {name} --files FILES'}"
        )

    @property
    def repair(self) -> str:
        """What makes damaged shards good again."""
        made_again = f"make it again with python -m scripts.chat_data, as it was made: {self.source}"
        return f"Repair: rm -rf '{self.folder}', and {made_again}."

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


def summary(corpus: ChatCorpus) -> str:
    """One line: what is in a corpus, and where."""
    counts = [sum(s.documents for s in corpus.shards if s.split == split) for split in SPLITS]
    return (
        f"{corpus.name}: {counts[0]} conversations to train on, {counts[1]} for validation, {counts[2]} to "
        f"test ({sum(s.bytes for s in corpus.shards) / 1e6:.1f} MB); {corpus.source}; {corpus.folder}"
    )


# -----------------------------------------------------------------------------
# Making a corpus


def prepare(args: ChatDataArgs) -> ChatCorpus:
    """Make or fetch a corpus; what is there already is not made again.

    Raises:
        UserError: an argument does not apply, a source is unusable, or a conversation cannot be used and is
            not to be left out.
    """
    made_of: dict[str, Callable[[Path, ChatDataArgs, LeftOut], None]]
    made_of = {"made": _prepare_made, "local": _prepare_local, **dict.fromkeys(HUB_SETS, _prepare_hub)}
    if args.corpus not in made_of:
        raise UserError(
            f"--corpus {args.corpus}: expected {', '.join(made_of)}. "
            f"For files of your own: --corpus local --name {args.corpus} --files FILES."
        )
    if args.corpus != "local" and (args.files or args.val_file):
        raise UserError(f"--files and --val-file go with --corpus local, not {args.corpus}.")
    folder = files.data_dir(args.name or args.corpus)
    left_out: LeftOut = [] if args.skip_bad else None
    files.require_writable(folder.parent)
    with locks.held(files.corpus_lock(folder.name), f"corpus {folder.name!r}", wait=True):
        made_of[args.corpus](folder, args, left_out)
    if left_out:
        print(f"{len(left_out)} conversations were left out. The first: {left_out[0]}")
    return ChatCorpus.open(folder.name)


def _write(folder: Path, source: str, *splits: Iterable[Row]) -> None:
    texts = ((json.dumps(row, ensure_ascii=False) for row in rows) for rows in splits)
    write_corpus(folder, source, *texts, kind=ChatCorpus)


def _prepare_made(folder: Path, args: ChatDataArgs, _: LeftOut) -> None:
    source = f"made with seed {args.seed}, {args.conversations} conversations"
    if not existing(folder, source, kind=ChatCorpus):
        train = (made.row("train", args.seed, index) for index in range(args.conversations))
        val = (made.row("train", args.seed + MADE_VAL_SEED, index) for index in range(MADE_VAL))
        test = (row for task in made.TASKS for row in made.examples(task, "test", MADE_TEST, args.seed))
        _write(folder, source, train, val, test)


def _prepare_local(folder: Path, args: ChatDataArgs, left_out: LeftOut) -> None:
    if not args.files:
        if existing(folder, "local files", kind=ChatCorpus):
            return
        raise UserError("--corpus local: name the conversations with --files (.jsonl, .json or .parquet).")
    paths, val_path = data_sources.find_files(args.files, args.val_file)
    source = f"local files, {len(paths)} of content {data_sources.content_digest(paths, val_path)}"
    if existing(folder, source, kind=ChatCorpus):
        return
    train = sources.checked(sources.of_files(paths), left_out)
    if val_path is not None:
        _write(folder, source, train, sources.checked(sources.of_files([val_path]), left_out), ())
    else:
        held: list[Row] = []
        _write(folder, source, _held_out(train, LOCAL_VAL_EVERY, held), held, ())


def _prepare_hub(folder: Path, args: ChatDataArgs, left_out: LeftOut) -> None:
    from nanochat.data import hub  # its library takes half a second

    remote = HUB_SETS[args.corpus]
    if existing(folder, f"{remote.repo}@", kind=ChatCorpus):
        return
    raw = folder.with_name(f".raw-{folder.name}")  # kept until all is there: a second try fetches the rest
    prefixes = [prefix for group in remote.files.values() for prefix in group]
    commit, paths = hub.fetch_parquet(remote.repo, remote.folder, prefixes, raw)
    rows: dict[str, Iterable[Row]] = {}
    for split in SPLITS:
        of_split = [path for prefix in remote.files.get(split, ()) for path in paths[prefix]]
        rows[split] = sources.checked(remote.rows(split, of_split), left_out)
    if remote.val_every:
        held: list[Row] = []
        rows |= {"train": _held_out(rows["train"], remote.val_every, held), "val": held}
    _write(folder, f"{remote.repo}@{commit}", *(rows[split] for split in SPLITS))
    files.remove_dir(raw)


def _held_out(rows: Iterable[Row], every: int, held: list[Row]) -> Iterator[Row]:
    """Pass rows on, but leave one in `every` of them in `held`: it is validation.

    The hash of its messages decides, so the same conversation is on the same side wherever it stands. The
    second one is held out in any case: a few conversations need validation, too.
    """
    for number, row in enumerate(rows):
        digest = hashlib.sha256(json.dumps(row["messages"]).encode()).digest()
        if number == 1 or int.from_bytes(digest[:8], "big") % every == 0:
            held.append(row)
        else:
            yield row


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


class _Named(TypedDict):
    corpus: str


class _Entry(_Named, total=False):
    split: str
    epochs: int
    limit: int


class _File(TypedDict):
    source: list[_Entry]


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
    parts = []
    for name in names:
        if name.endswith(MIXTURE_SUFFIX):
            parts += _read_mixture(Path(name))
        else:
            parts.append(Source(ChatCorpus.open(name)))
    for source in parts:
        require_split(source.corpus, source.split)
    found = [source.corpus.name for source in parts]
    if twice := next((name for name in found if found.count(name) > 1), None):
        raise UserError(f"corpus {twice!r} is named twice. Name it once, with epochs in a mixture.")
    if not parts:
        raise UserError("--data: expected a chat corpus or a TOML file of a mixture.")
    return tuple(parts)


def _read_mixture(path: Path) -> list[Source]:
    try:
        entries = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: not a readable TOML file ({error}). See docs/chat.md.") from None
    wrong = typed_json.mismatch(entries, _File)
    for number, entry in enumerate([] if wrong else entries["source"]):
        small = next((key for key in ("epochs", "limit") if entry.get(key, 1) < 1), None)
        if small:
            wrong = f"source[{number}].{small} is {entry[small]}, expected a number from 1"
        elif unknown := entry.keys() - Source.__dataclass_fields__.keys():
            wrong = f"source[{number}] has an unknown key: {min(unknown)}"
    if wrong:
        raise UserError(f"{path}: {wrong}. See docs/chat.md.")
    return [Source(**{**entry, "corpus": ChatCorpus.open(entry["corpus"])}) for entry in entries["source"]]
