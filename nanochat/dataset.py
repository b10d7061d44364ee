"""Named corpora: a folder of shards and a manifest, which is all that later stages trust.

python -m nanochat.dataset --corpus stdlib
python -m nanochat.dataset --corpus fineweb-edu -n 8
python -m nanochat.dataset --corpus local --files FOLDER_OR_FILES --val-file shard_00010.parquet --name prose
python -m nanochat.dataset --corpus prose --verify
python -m nanochat.dataset --list
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import re
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nanochat import config, corpora, files, hub, shards
from nanochat.errors import UserError, cli
from nanochat.shards import Shard

FORMAT = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "val")
HASH_THREADS = 4
SAMPLED_BYTES = 1 << 16


class Corpus:
    """A verified view of a corpus folder.

    Attributes:
        name: name of the folder.
        source: where the text is from.
        folder: its path.
        shards: all shards, as the manifest lists them.
    """

    def __init__(self, folder: Path, name: str, source: str, members: Sequence[Shard]) -> None:
        self.name = name
        self.source = source
        self.folder = folder
        self.shards = tuple(members)
        self._verified: set[str] = set()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, name: str) -> Corpus:
        """Read the manifest, look for every file at its size, and verify the validation shards' bytes.

        Raises:
            UserError: no such corpus, a manifest of another version, or a shard that is absent or damaged.
        """
        corpus = cls.read_manifest(files.data_dir(name))
        for shard in corpus.shards:
            corpus._check_size(shard)
        for shard in corpus.val_shards:
            corpus.verify(shard)
        return corpus

    @classmethod
    def read_manifest(cls, folder: Path) -> Corpus:
        """The corpus that a manifest describes, without a look at its shards."""
        path = folder / MANIFEST
        if not path.is_file():
            name = folder.name
            made = name if name in (*hub.HUB_CORPORA, "stdlib") else f"local --name {name} --files FILES"
            raise UserError(
                f"corpus {name!r}: {path} is not there. Make it: python -m nanochat.dataset --corpus {made}"
            )
        raw = files.read_json(path)
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            found = raw.get("format") if isinstance(raw, dict) else raw
            raise UserError(
                f"{path}: format {found!r}, expected {FORMAT}. Delete {folder} and make it again."
            )
        try:
            members = [
                Shard(**{f.name: item[f.name] for f in dataclasses.fields(Shard)}) for item in raw["shards"]
            ]
            corpus = cls(folder, str(raw["name"]), str(raw["source"]), members)
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{path}: a field is missing or wrong ({error}). Delete {folder} and make it again."
            ) from None
        if problem := _manifest_problem(members):
            raise UserError(f"{path}: {problem}. Delete {folder} and make it again.")
        return corpus

    def write_manifest(self, folder: Path) -> None:
        """Write manifest.json into `folder`, atomically."""
        members = [dataclasses.asdict(shard) for shard in self.shards]
        value = {"format": FORMAT, "name": self.name, "source": self.source, "shards": members}
        files.write_json(folder / MANIFEST, value)

    @property
    def train_shards(self) -> list[Shard]:
        """Shards to train on, in the manifest's order."""
        return [shard for shard in self.shards if shard.split == "train"]

    @property
    def val_shards(self) -> list[Shard]:
        """Held-out shards; at least one."""
        return [shard for shard in self.shards if shard.split == "val"]

    @property
    def fingerprint(self) -> str:
        """sha256 that changes when any byte of any shard, its split or its place changes."""
        listed = [[shard.name, shard.split, shard.sha256] for shard in self.shards]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()

    def path(self, shard: Shard) -> Path:
        """Where a shard lies."""
        return self.folder / shard.name

    def read_block(self, shard: Shard, row_group: int) -> list[str]:
        """The documents of a row group, without nulls and empty strings; thread-safe.

        The shard is hashed at its first use, and page checksums are verified at every one.

        Raises:
            UserError: the shard is absent or damaged; names it, both digests and the command that repairs it.
        """
        self.verify(shard)
        try:
            return shards.read_texts(self.path(shard), row_group)
        except UserError as error:
            raise UserError(f"{error} {self.repair(shard)}") from None

    def texts(self, *, max_chars: int, doc_cap: int) -> Iterator[str]:
        """Training documents in the order of the shards, until `max_chars` characters have been given.

        Args:
            max_chars: about how many characters in all; the last document may go over.
            doc_cap: characters taken of each document, from its beginning.
        """
        given = 0
        for shard in self.train_shards:
            for row_group in range(shard.row_groups):
                for text in self.read_block(shard, row_group):
                    if given >= max_chars:
                        return
                    yield text[:doc_cap]
                    given += min(len(text), doc_cap)

    def verify(self, shard: Shard) -> None:
        """Hash a shard once in the life of this object, and compare with the manifest."""
        with self._lock:
            if shard.name not in self._verified:
                self._check_size(shard)
                self._check_digest(shard)
                self._verified.add(shard.name)

    def problem(self, shard: Shard) -> str:
        """What is wrong with a shard, hashed now; "" if nothing is."""
        try:
            self._check_size(shard)
            self._check_digest(shard)
        except UserError as error:
            return str(error)
        return ""

    def is_absent(self, shard: Shard) -> bool:
        """True if the file is not there at its size."""
        path = self.path(shard)
        return not path.is_file() or path.stat().st_size != shard.bytes

    def _check_size(self, shard: Shard) -> None:
        path = self.path(shard)
        if not path.is_file():
            raise UserError(
                f"{path}: the shard is missing; expected sha256 {shard.sha256}. {self.repair(shard)}"
            )
        if path.stat().st_size != shard.bytes:
            self._check_digest(shard)

    def _check_digest(self, shard: Shard) -> None:
        path = self.path(shard)
        try:
            size, digest = path.stat().st_size, files.sha256(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}). {self.repair(shard)}") from None
        if (size, digest) != (shard.bytes, shard.sha256):
            raise UserError(
                f"{path}: the shard is damaged: {size} bytes with sha256 {digest}, "
                f"expected {shard.bytes} bytes with sha256 {shard.sha256}. {self.repair(shard)}"
            )

    def repair(self, shard: Shard) -> str:
        """The command that makes a shard good again."""
        name = f" --name {self.name}"
        for corpus, remote in hub.HUB_CORPORA.items():
            if self.source.startswith(remote.repo):
                again = f"--corpus {corpus}{name if self.name != corpus else ''} -n {len(self.train_shards)}"
                return f"Repair: rm -f '{self.path(shard)}' && python -m nanochat.dataset {again}"
        if self.source.startswith("local"):
            again = f"--corpus local{name if self.name != 'local' else ''} --files FILES"
        else:
            again = f"--corpus stdlib{name if self.name != 'stdlib' else ''}"
        return f"Repair: rm -rf '{self.folder}' && python -m nanochat.dataset {again}"


def _manifest_problem(members: Sequence[Shard]) -> str:
    """What no manifest of ours would hold; "" for a sound one. Names become paths, so they are checked."""
    kinds = {"name": str, "split": str, "bytes": int, "documents": int, "row_groups": int, "sha256": str}
    for shard in members:
        for field, kind in kinds.items():
            value = getattr(shard, field)
            if type(value) is not kind or (isinstance(value, int) and value < 0):
                return f"shard {shard.name!r} has {field} {value!r}"
        if not re.fullmatch(r"[\w-][\w.-]*\.parquet", shard.name) or shard.split not in SPLITS:
            return f"shard {shard.name!r} of split {shard.split!r}"
    if len({shard.name for shard in members}) != len(members):
        return "a shard is listed twice"
    for split in SPLITS:
        if not any(shard.split == split and shard.row_groups for shard in members):
            return f"no shard of split {split!r}"
    return ""


# -----------------------------------------------------------------------------
# Making a corpus


def prepare(
    corpus: str,
    *,
    num_shards: int | None = None,
    named_files: Sequence[str] = (),
    val_file: str = "",
    name: str = "",
) -> Corpus:
    """Make or complete a corpus; what is there already is not made again.

    Args:
        corpus: "stdlib", "local", "fineweb-edu" or "climbmix".
        num_shards: training shards to have, for a corpus of the hub; None for all.
        named_files: files and folders of a local corpus.
        val_file: the validation file of a local corpus; "" holds out the last hundredth.
        name: of the corpus folder; "" for the corpus's own.

    Raises:
        UserError: an argument does not apply, a source is unusable, or shards are missing in the end.
    """
    folder = files.data_dir(name or corpus)
    if corpus != "local" and (named_files or val_file):
        raise UserError(
            f"--files and --val-file make a corpus of your own: use --corpus local, not {corpus}."
        )
    if corpus not in hub.HUB_CORPORA and num_shards is not None:
        raise UserError(
            f"-n chooses shards of {', '.join(hub.HUB_CORPORA)}; --corpus {corpus} is made whole."
        )
    if corpus not in ("stdlib", "local", *hub.HUB_CORPORA):
        raise UserError(
            f"--corpus {corpus}: expected stdlib, local, {', '.join(hub.HUB_CORPORA)}. "
            f"For files of your own: --corpus local --name {corpus} --files FILES."
        )
    files.require_writable(folder.parent)
    files.sweep_temporaries(folder.parent)
    if corpus == "stdlib":
        _prepare_stdlib(folder)
    elif corpus == "local":
        _prepare_local(folder, named_files, val_file)
    else:
        _prepare_hub(folder, corpus, num_shards)
    return Corpus.open(folder.name)


def _existing(folder: Path, source: str) -> Corpus | None:
    """The corpus of `folder` if its shards are there; None if it has to be made.

    Raises:
        UserError: the folder holds a corpus from another source, which must not be replaced in silence.
    """
    if not (folder / MANIFEST).is_file():
        return None
    corpus = Corpus.read_manifest(folder)
    if not corpus.source.startswith(source):
        raise UserError(
            f"{folder} holds a corpus from another source ({corpus.source}; asked for: {source}). "
            "Give the new one a --name of its own, or delete the folder."
        )
    return None if any(map(corpus.is_absent, corpus.shards)) else corpus


def _prepare_stdlib(folder: Path) -> None:
    if _existing(folder, "python "):
        return
    train, val = corpora.stdlib_documents()
    source = f"python {platform.python_version()} standard library"
    _write_corpus(folder, source, iter(train), deque(val))


def _prepare_local(folder: Path, named: Sequence[str], val_file: str) -> None:
    if not named:
        if _existing(folder, "local files"):
            return
        raise UserError(
            "--corpus local: name the text with --files (parquet, jsonl, txt, or folders of them)."
        )
    paths, val_path = corpora.find_files(named, val_file)
    source = f"local files, {len(paths)} of listing {_listing_digest(paths, val_path)}"
    if _existing(folder, source):
        return
    held: deque[str] = deque()
    if val_path is None:
        train = corpora.hold_out_end(corpora.local_documents(paths), held)
    else:
        train = corpora.local_documents(paths)
        held.extend(corpora.local_documents([val_path]))
    _write_corpus(folder, source, corpora.shuffled(train, seed=0), held)


def _listing_digest(paths: Sequence[Path], val_path: Path | None) -> str:
    """Tells whether the same files are named again: their names, sizes, first and last bytes."""
    digest = hashlib.sha256()
    for path in [*paths, *([val_path] if val_path else [])]:
        size = path.stat().st_size
        digest.update(f"{path.name} {size} {path == val_path}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(SAMPLED_BYTES))
            file.seek(max(0, size - SAMPLED_BYTES))
            digest.update(file.read(SAMPLED_BYTES))
    return digest.hexdigest()[:16]


def _write_corpus(folder: Path, source: str, train: Iterator[str], val: deque[str]) -> None:
    """Write a whole corpus folder at once. `val` may still be filling while `train` is read."""
    with files.atomic_dir(folder) as temporary:
        members = shards.write_shards(train, temporary, "train", 0)
        members += shards.write_shards(val, temporary, "val", len(members))
        for split in SPLITS:
            if not any(shard.split == split for shard in members):
                raise UserError(
                    f"corpus {folder.name!r}: there is no text for the {split} split. "
                    "Name files with at least two documents, or a --val-file that is not empty."
                )
        Corpus(folder, folder.name, source, members).write_manifest(temporary)


def _prepare_hub(folder: Path, corpus: str, num_shards: int | None) -> None:
    remote = hub.HUB_CORPORA[corpus]
    count = remote.last if num_shards is None else num_shards
    if not 1 <= count <= remote.last:
        raise UserError(f"-n {count}: {corpus} has 1 to {remote.last} training shards.")
    wanted = [remote.val_shard, *(remote.shard(index) for index in range(count))]
    revision: str | None = None
    known: dict[str, Shard] = {}
    if (folder / MANIFEST).is_file():
        _existing(folder, remote.repo)
        before = Corpus.read_manifest(folder)
        revision = before.source.rpartition("@")[2]
        known = {shard.name: shard for shard in before.shards if not before.is_absent(shard)}
    missing = [name for name in wanted if name not in known]
    if not missing:
        return
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{corpus}: fetching {len(missing)} shards from {remote.repo} into {folder}", flush=True)
    commit, digests = hub.fetch(remote.repo, missing, folder, revision)
    for name in missing:
        split = "val" if name == remote.val_shard else "train"
        known[name] = shards.describe(folder / name, split, digests[name])
    members = [known[name] for name in sorted(known)]
    Corpus(folder, folder.name, f"{remote.repo}@{commit}", members).write_manifest(folder)


# -----------------------------------------------------------------------------
# Command line


def verify_all(corpus: Corpus) -> None:
    """Hash every shard again, in parallel.

    Raises:
        UserError: lists every shard that is missing or damaged.
    """
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        problems = [problem for problem in pool.map(corpus.problem, corpus.shards) if problem]
    if problems:
        raise UserError(
            f"{len(problems)} of {len(corpus.shards)} shards are wrong:\n  " + "\n  ".join(problems)
        )
    print(f"{corpus.name}: {len(corpus.shards)} shards verified")


def summary(corpus: Corpus) -> str:
    """One line: what is in a corpus, and where."""
    train, val = corpus.train_shards, corpus.val_shards
    return (
        f"{corpus.name}: {sum(s.documents for s in train)} documents in {len(train)} training shards "
        f"({sum(s.bytes for s in train) / 1e6:.1f} MB), {sum(s.documents for s in val)} for validation "
        f"({', '.join(s.name for s in val)}); {corpus.source}; {corpus.folder}"
    )


@cli
def main() -> None:
    """Make, verify or list corpora."""
    args = config.parse(config.DatasetArgs)
    if args.list:
        for manifest in sorted(files.data_dir("any").parent.glob(f"*/{MANIFEST}")):
            print(summary(Corpus.read_manifest(manifest.parent)))
    elif args.verify:
        verify_all(Corpus.read_manifest(files.data_dir(args.name or args.corpus)))
    else:
        corpus = prepare(
            args.corpus,
            num_shards=args.num_shards,
            named_files=args.files,
            val_file=args.val_file,
            name=args.name,
        )
        print(summary(corpus))
        if args.files and not args.val_file:
            print("No --val-file was named: the last hundredth of the documents is validation.")


if __name__ == "__main__":
    main()
