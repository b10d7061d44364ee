"""Named corpora: a folder of shards and a manifest, which is all that later stages trust.

python -m scripts.dataset --corpus stdlib
python -m scripts.dataset --corpus fineweb-edu -n 8
python -m scripts.dataset --corpus fineweb10B-gpt2 -n 9
python -m scripts.dataset --corpus local --files FOLDER_OR_FILES --val-file shard_00010.parquet --name prose
python -m scripts.dataset --corpus prose --verify
python -m scripts.dataset --list

The manifest is a plan. For a corpus of the hub it is written before the first shard is fetched: sizes,
digests and counts of all shards asked for (-n) are known from the hub. So the fingerprint, and with it the
order of the data, is that of the full corpus from the beginning, however few shards have been fetched. The
disk alone says which are there: a shard has its name only when it is complete and verified. A reader that
comes to a missing one waits for it, if a download lives (pending_download.py). Another -n is another plan.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from nanochat.common import files, locks, typed_json
from nanochat.common.checksums import BrokenFileError, ChecksummedFile
from nanochat.common.errors import UserError
from nanochat.common.progress import bytes_bar
from nanochat.data import parquet_shards, pending_download, text_files, token_shards
from nanochat.data import sources as data_sources
from nanochat.data.hub_corpora import HUB_CORPORA, name_of
from nanochat.data.parquet_shards import Shard
from nanochat.tokenizer.tokenizer import FILE_NAME

FORMAT = 1
MANIFEST = "manifest.json"
HASH_THREADS = 8

Result = TypeVar("Result")
Kind = TypeVar("Kind", bound="Corpus")


class OtherKindError(UserError):
    """A corpus holds something else than is asked for."""


class Corpus:
    """A verified view of a corpus folder. A subclass holds something else than text (`chat/corpus.py`).

    Attributes:
        holds: what its documents are; a manifest says it where it is not text.
        column: of its shards.
        splits: that its shards may be of.
        required: splits that have to have one.
        name: name of the folder.
        source: where the text is from.
        folder: its path.
        shards: all shards, as the manifest lists them.
        train_shards: those to train on.
        val_shards: those that are held out.
        comes_in_order: True if shards are fetched one after another and are read so in the first epoch. Those
            of the hub are: their documents have been shuffled over all shards.
    """

    holds: ClassVar[str] = "text"
    column: ClassVar[str] = parquet_shards.TEXT_COLUMN
    splits: ClassVar[Sequence[str]] = parquet_shards.SPLITS
    required: ClassVar[Sequence[str]] = parquet_shards.SPLITS

    def __init__(self, folder: Path, name: str, source: str, members: Sequence[Shard]) -> None:
        self.name = name
        self.source = source
        self.folder = folder
        self.shards = tuple(members)
        self.train_shards, self.val_shards = (
            [shard for shard in members if shard.split == split] for split in parquet_shards.SPLITS
        )
        self.comes_in_order = bool(name_of(source))
        self._opened: dict[str, ChecksummedFile] = {}
        self._locks = {shard.name: threading.Lock() for shard in self.shards}

    @classmethod
    def open(cls: type[Kind], name: str) -> Kind:
        """Read the manifest, look for every file at its size, and verify the validation shards' bytes.

        Training shards may still be fetched by another process: `read_block` waits for them.

        Raises:
            UserError: no such corpus, a manifest of another version, or a shard that is absent or damaged.
        """
        corpus = cls.read_manifest(files.data_dir(name))
        missing = [shard for shard in corpus.train_shards if not corpus.path(shard).exists()]
        if missing and corpus.comes_in_order and pending_download.has_begun(corpus.folder):
            print(f"{corpus.name}: {len(corpus.absent)} of {len(corpus.shards)} shards are on their way")
        else:
            for problem in filter(None, map(corpus.problem, corpus.absent)):
                raise UserError(problem)
        for shard in corpus.val_shards:
            corpus.verify(shard)
        return corpus

    @classmethod
    def read_manifest(cls: type[Kind], folder: Path) -> Kind:
        """The corpus that a manifest describes, without a look at its shards.

        Raises:
            UserError: there is none, it is damaged, or the corpus holds something else.
        """
        path = folder / MANIFEST
        if not path.is_file():
            command = cls.make_command(folder.name)
            raise UserError(f"corpus {folder.name!r}: {path} is not there. Make it: {command}")
        again = f"Delete {folder} and make it again."
        raw = files.read_json(path, dict[str, Any], advice=again)
        if (holds := raw.get("holds", "text")) != cls.holds:
            raise OtherKindError(
                f"corpus {folder.name!r} holds {typed_json.shown(holds)}, where one of {cls.holds} is "
                f"needed. Name another, or make one: {cls.make_command('NAME')}"
            )
        try:
            if raw.get("format") != FORMAT:
                raise ValueError(f"format {typed_json.shown(raw.get('format'))}, expected {FORMAT}")
            members = parquet_shards.from_manifest(raw["shards"], cls.splits, cls.required)
            return cls(folder, str(raw["name"]), str(raw["source"]), members)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: a field is missing or wrong ({error}). {again}") from None

    @staticmethod
    def make_command(name: str) -> str:
        """The command that makes a corpus of this name."""
        made = name if name in (*HUB_CORPORA, "stdlib") else f"local --name {name} --files FILES"
        return f"python -m scripts.dataset --corpus {made}"

    def write_manifest(self, folder: Path) -> None:
        """Write manifest.json into `folder`, atomically."""
        members = [dataclasses.asdict(shard) for shard in self.shards]
        value: dict[str, Any] = {"format": FORMAT, "name": self.name, "source": self.source}
        value |= {} if self.holds == Corpus.holds else {"holds": self.holds}
        value["shards"] = members
        files.write_json(folder / MANIFEST, value)

    @property
    def fingerprint(self) -> str:
        """sha256 that changes when any byte of any shard, its split or the order of shards changes."""
        listed = [[shard.name, shard.split, shard.sha256] for shard in self.shards]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()

    def path(self, shard: Shard) -> Path:
        """Where a shard lies."""
        return self.folder / shard.name

    def read_block(self, shard: Shard, row_group: int) -> list[str]:
        """The documents of a row group; see `read_column`."""
        return list(self.read_column(shard, row_group).to_pylist())

    def read_column(self, shard: Shard, row_group: int) -> pa.Array:
        """The documents of a row group as an array of Arrow, without nulls and empty strings; thread-safe.

        The shard is hashed at its first use, and compared with that at every one: see `checksums`.

        Raises:
            UserError: the shard is absent, damaged or has changed; names it and the command that repairs it.
        """
        if shard.holds_tokens:
            raise UserError(
                f"{self.path(shard)}: holds tokens, not text. Its tokenizer came with it: {self.name}."
            )
        return self._use(shard, lambda file: parquet_shards.read_column(file, row_group))

    def read_rows(self, shard: Shard, chunk: int, row_slots: int, vocab_size: int) -> NDArray[np.int32]:
        """The rows of a chunk of a shard of tokens; see `token_shards.read_rows`. Compared as text is.

        Raises:
            UserError: the shard is absent, damaged, has changed, or is of another vocabulary.
        """
        return self._use(shard, lambda file: token_shards.read_rows(file, chunk, row_slots, vocab_size))

    @property
    def holds_tokens(self) -> bool:
        """True if the shards hold token ids, False if text."""
        return self.shards[0].holds_tokens

    def verify(self, shard: Shard) -> None:
        """Hash a shard once in the life of this object, and compare with the manifest.

        Raises:
            UserError: it is damaged, absent, or does not arrive.
        """
        self._use(shard, lambda file: None)

    def _use(self, shard: Shard, work: Callable[[ChecksummedFile], Result]) -> Result:
        """Do something with the file of a shard, hashed at the first use; an error says what repairs it."""
        try:
            with self._locks[shard.name]:
                if shard.name not in self._opened:
                    if self.comes_in_order and not self.path(shard).exists():
                        pending_download.wait_for(self.path(shard))
                    self._opened[shard.name] = parquet_shards.open_shard(self.path(shard), shard)
            return work(self._opened[shard.name])
        except BrokenFileError as error:
            raise UserError(f"{error} {self.repair}") from None

    def problem(self, shard: Shard) -> str:
        """What is wrong with a shard, hashed now, and the command that repairs it; "" if nothing is."""
        text = parquet_shards.problem(self.path(shard), shard)
        return f"{text} {self.repair}" if text else ""

    @property
    def absent(self) -> list[Shard]:
        """Shards that are not there at their size."""
        paths = {shard: self.path(shard) for shard in self.shards}
        return [s for s, path in paths.items() if not path.is_file() or path.stat().st_size != s.bytes]

    @property
    def repair(self) -> str:
        """The command that makes damaged shards good again."""
        if self.source.startswith("repackaged"):
            return f"Repair: rm -rf '{self.folder}' && python -m dev.repackage_data --name {self.name} ..."
        remote = name_of(self.source)
        corpus = remote or ("local" if self.source.startswith("local") else "stdlib")
        name = f" --name {self.name}" if self.name != corpus else ""
        named_files = " --files FILES" if corpus == "local" else ""
        command = f"python -m scripts.dataset --corpus {corpus}{name}{named_files}"
        if remote:  # it hashes all, and fetches what is wrong
            return f"Repair: {command} -n {len(self.train_shards)}"
        return f"Repair: rm -rf '{self.folder}' && {command}"


# -----------------------------------------------------------------------------
# Making a corpus


def prepare(
    corpus: str,
    *,
    num_shards: int | None = None,
    first: int | None = None,
    named_files: Sequence[str] = (),
    val_file: str = "",
    name: str = "",
) -> Corpus:
    """Make or complete a corpus; what is there already is not made again.

    Args:
        corpus: "stdlib", "local" or one of the hub.
        num_shards: training shards of a corpus of the hub; None for all.
        first: how many of them to fetch now; None for all. The others stay planned.
        named_files: files and folders of a local corpus.
        val_file: the validation file of a local corpus; "" holds out the end.
        name: of the corpus folder; "" for the corpus's own.

    Raises:
        UserError: an argument does not apply, a source is unusable, or shards are missing in the end.
    """
    folder = files.data_dir(name or corpus)
    if corpus != "local" and (named_files or val_file):
        raise UserError(
            f"--files and --val-file make a corpus of your own: use --corpus local, not {corpus}."
        )
    if corpus not in HUB_CORPORA and (num_shards, first) != (None, None):
        raise UserError(
            f"-n and --first choose shards of {', '.join(HUB_CORPORA)}; --corpus {corpus} is made whole."
        )
    if corpus not in ("stdlib", "local", *HUB_CORPORA):
        raise UserError(
            f"--corpus {corpus}: expected stdlib, local, {', '.join(HUB_CORPORA)}. "
            f"For files of your own: --corpus local --name {corpus} --files FILES."
        )
    files.require_writable(folder.parent)
    if corpus in HUB_CORPORA:
        return _prepare_hub(folder, corpus, num_shards, first)
    with locks.held(files.corpus_lock(folder.name), f"corpus {folder.name!r}", wait=True):
        if corpus == "local":
            _prepare_local(folder, named_files, val_file)
        elif not existing(folder, "python "):
            source = f"python {platform.python_version()} standard library"
            write_corpus(folder, source, *data_sources.stdlib_documents())
    return Corpus.open(folder.name)


def existing(folder: Path, *sources: str, kind: type[Corpus] = Corpus) -> Corpus | None:
    """The corpus of `folder` if its shards are there; None if it has to be made.

    Args:
        folder: where it lies.
        sources: beginnings of the names of the sources that are the right ones.
        kind: what it holds.

    Raises:
        UserError: the folder holds a corpus from another source, which must not be replaced in silence.
    """
    if not (folder / MANIFEST).is_file():
        return None
    corpus = kind.read_manifest(folder)
    if not corpus.source.startswith(sources):
        raise UserError(
            f"{folder} holds a corpus from another source, or its files have changed since ({corpus.source}; "
            f"asked for: {sources[0]}). Give the new one a --name of its own, or delete the folder."
        )
    return None if corpus.absent else corpus


def _prepare_local(folder: Path, named: Sequence[str], val_file: str) -> None:
    if not named:
        if existing(folder, "local files"):
            return
        raise UserError(f"--corpus local: name the text with --files (folders, or {text_files.ACCEPTED}).")
    paths, val_path = data_sources.find_files(named, val_file)
    if others := data_sources.left_out(named):
        print(others)
    known = f"local files, {len(paths)} of "
    source = f"{known}content {data_sources.content_digest(paths, val_path)}"
    if existing(folder, source, f"{known}listing {data_sources.listing_digest(paths, val_path)}"):
        return
    write_corpus(folder, source, *data_sources.local_splits(paths, val_path))


def write_corpus(folder: Path, source: str, *documents: Iterable[str], kind: type[Corpus] = Corpus) -> None:
    """Write a corpus folder, all of it or nothing.

    Args:
        folder: where it goes.
        source: where the documents are from.
        documents: those of each of `kind.splits`; one split is begun when the one before has ended.
        kind: what it holds.

    Raises:
        UserError: a split that has to have documents has none.
    """
    with files.atomic_dir(folder, owned=folder.name) as temporary:
        members: list[Shard] = []
        for split, texts in zip(kind.splits, documents, strict=True):
            members += parquet_shards.write_shards(texts, temporary, split, len(members), kind.column)
        for split in kind.required:
            if not any(shard.split == split for shard in members):
                raise UserError(
                    f"corpus {folder.name!r}: there is no text for the {split} split. "
                    "Name files with at least two documents, or a --val-file that is not empty."
                )
        if not members:
            raise UserError(
                f"corpus {folder.name!r}: there is nothing in it. Name files that hold something."
            )
        kind(folder, folder.name, source, members).write_manifest(temporary)


def _prepare_hub(folder: Path, corpus: str, num_shards: int | None, first: int | None) -> Corpus:
    """Write the manifest of all shards asked for, then fetch the first of them; an earlier plan stays."""
    from nanochat.data import hub  # its library takes half a second

    remote, known, commit = HUB_CORPORA[corpus], {}, ""
    count = remote.last if num_shards is None else num_shards
    if not 1 <= count <= remote.last:
        raise UserError(f"-n {count}: {corpus} has 1 to {remote.last} training shards.")
    names = [*(remote.shard(index) for index in range(count)), remote.val_shard]
    if (folder / MANIFEST).is_file():
        existing(folder, remote.repo)
        before = Corpus.read_manifest(folder)
        known, commit = {shard.name: shard for shard in before.shards}, before.source.rpartition("@")[2]
    with pending_download.staging(folder) as stage, hub.Hub(remote.repo) as source:
        commit = commit or source.newest_commit(remote.val_shard)
        known |= source.describe([name for name in names if name not in known], commit, remote.val_shard)
        planned = Corpus(folder, folder.name, f"{remote.repo}@{commit}", [known[name] for name in names])
        planned.write_manifest(folder)
        print(f"{corpus}: {len(planned.absent)} of {len(names)} shards are to be fetched into {folder}")
        wanted = [*planned.val_shards, *planned.train_shards[:first]]
        hub.require_space(folder, wanted)
        source.fetch(wanted, commit, folder, stage)
    tokenizer_dir = files.tokenizer_dir(folder.name)
    if remote.vocabulary and not (tokenizer_dir / FILE_NAME).is_file():
        with pending_download.staging(folder) as stage, hub.Hub(remote.vocabulary) as source:
            source.fetch_tokenizer(stage).save(tokenizer_dir)
    return planned


# -----------------------------------------------------------------------------
# Command line


def all_of(kind: type[Kind]) -> Iterator[Kind]:
    """The corpora on the disk that hold what `kind` does, by their manifests.

    Raises:
        UserError: in the end, if manifests are damaged.
    """
    damaged: list[str] = []
    for manifest in sorted(files.data_dir("any").parent.glob(f"*/{MANIFEST}")):
        try:
            corpus = kind.read_manifest(manifest.parent)
        except OtherKindError:
            continue
        except UserError as error:
            damaged.append(str(error))
            continue
        yield corpus
    if damaged:
        raise UserError("; ".join(damaged))


def verify_all(corpus: Corpus) -> None:
    """Hash every shard again, in parallel.

    Raises:
        UserError: lists every shard that is missing or damaged.
    """
    total, done, problems = sum(shard.bytes for shard in corpus.shards), 0, []
    with ThreadPoolExecutor(HASH_THREADS) as pool, bytes_bar(f"verifying {corpus.name}", total) as show:
        for shard, problem in zip(corpus.shards, pool.map(corpus.problem, corpus.shards), strict=True):
            problems += [problem] if problem else []
            done += shard.bytes
            show(done)
    if problems:
        raise UserError(
            f"{len(problems)} of {len(corpus.shards)} shards are wrong:\n  " + "\n  ".join(problems)
        )
    print(f"{corpus.name}: {len(corpus.shards)} shards verified")


def summary(corpus: Corpus) -> str:
    """One line: what is in a corpus, and where."""
    train, val = corpus.train_shards, corpus.val_shards
    unit = "tokens" if corpus.holds_tokens else "documents"
    count, held = (sum(getattr(shard, unit) for shard in split) for split in (train, val))
    return (
        f"{corpus.name}: {count} {unit} in {len(train)} training shards "
        f"({sum(s.bytes for s in train) / 1e6:.1f} MB), {held} for validation "
        f"({', '.join(s.name for s in val)}); {corpus.source}; {corpus.folder}"
    )
