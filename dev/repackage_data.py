"""Any text -> a corpus of ours: exact duplicates removed, shuffled, in fixed row groups, some held out.

    python -m dev.repackage_data --files FOLDER_OR_FILES --name mine
    python -m dev.repackage_data --dataset HuggingFaceFW/fineweb-edu --config sample-10BT --name edu

Documents are put in the order of a hash of their text that is keyed with the seed. That is a shuffle of all
of them, whatever their number; duplicates become neighbours; and the result depends on the set of documents
and the seed alone, not on the order of the input, the number of workers or what runs them. Two passes:
documents are spilled to buckets by the first bits of the hash, then one bucket after another is sorted in
memory and written. The disk holds the text, uncompressed, for a while.

Data sets are streamed with `datasets`. Workers are processes of this machine; with --ray they are tasks of
Ray Data, which have to see the same disk.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import struct
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from nanochat.common import files, locks
from nanochat.common.errors import UserError, cli
from nanochat.data import sources
from nanochat.data.corpus import Corpus, summary, write_corpus

DIGEST_BYTES = 16
HEADER = struct.Struct(f"<{DIGEST_BYTES}sQ")  # of a document in a bucket: its digest, its bytes
SPILL_BYTES = 1 << 16  # held of each bucket before they are written
MAX_VAL_CHARS = 1 << 26  # of text for validation, which is held in memory
TOLD_DOCUMENTS = 1_000_000  # between two lines of progress


@dataclass(frozen=True)
class Source:
    """Where the text is from: local files, or a data set of the hub."""

    paths: tuple[Path, ...] = ()
    dataset: str = ""
    config: str | None = None
    split: str = "train"
    column: str = "text"

    def documents(self, part: int, parts: int) -> Iterator[str]:
        """The documents of one of so many parts."""
        if self.paths:
            return sources.local_documents(self.paths[part::parts])
        return self._streamed(part, parts)

    def _streamed(self, part: int, parts: int) -> Iterator[str]:
        from datasets import load_dataset

        rows: Any = load_dataset(self.dataset, self.config, split=self.split, streaming=True)
        if parts > rows.num_shards:
            raise UserError(f"--workers {parts}: {self.dataset} has {rows.num_shards} files; use fewer.")
        for row in rows.shard(num_shards=parts, index=part) if parts > 1 else rows:
            if self.column not in row:
                raise UserError(f"{self.dataset}: --column {self.column}: it has {sorted(row)}.")
            text = row[self.column]
            if not isinstance(text, str | None):
                raise UserError(f"{self.dataset}: column {self.column!r} holds {type(text).__name__}.")
            if text and text.strip():
                yield from sources.split_text(text, sources.MAX_DOCUMENT_CHARS)


@dataclass(frozen=True)
class Spill:
    """The first pass: where the buckets are, and how documents are dealt to them."""

    folder: Path
    buckets: int
    seed: int

    def write(self, source: Source, part: int, parts: int) -> int:
        """Deal the documents of one part to buckets; returns how many there were."""
        held = [bytearray() for _ in range(self.buckets)]
        key = self.seed.to_bytes(8, "little")
        count = 0
        for document in source.documents(part, parts):
            data = document.encode()
            digest = hashlib.blake2b(data, digest_size=DIGEST_BYTES, key=key).digest()
            bucket = int.from_bytes(digest[:4], "big") * self.buckets >> 32
            held[bucket] += HEADER.pack(digest, len(data))
            held[bucket] += data
            if len(held[bucket]) > SPILL_BYTES:
                self._append(bucket, part, held[bucket])
            count += 1
            if count % TOLD_DOCUMENTS == 0:
                print(f"part {part}: {count:,} documents", flush=True)
        for bucket, rest in enumerate(held):
            self._append(bucket, part, rest)
        return count

    def _append(self, bucket: int, part: int, data: bytearray) -> None:
        with (self.folder / f"{bucket:05d}-{part:05d}").open("ab") as file:
            file.write(data)
        data.clear()

    def read(self) -> Iterator[str]:
        """All documents in the order of their digests, each once; a bucket is deleted once it is read."""
        for bucket in range(self.buckets):
            paths = sorted(self.folder.glob(f"{bucket:05d}-*"))
            data = b"".join(path.read_bytes() for path in paths)
            found: list[tuple[bytes, int, int]] = []
            at = 0
            while at < len(data):
                digest, size = HEADER.unpack_from(data, at)
                at += HEADER.size
                found.append((digest, at, size))
                at += size
            found.sort()
            for i, (digest, start, size) in enumerate(found):
                if i == 0 or digest != found[i - 1][0]:
                    yield data[start : start + size].decode()
            for path in paths:
                path.unlink()


def spill_all(spill: Spill, source: Source, workers: int, use_ray: bool) -> int:
    """The first pass over all parts; returns the number of documents."""
    parts = min(workers, len(source.paths)) if source.paths else workers
    if use_ray:
        import ray.data

        rows = ray.data.from_items([{"part": part} for part in range(parts)], override_num_blocks=parts)
        told = rows.map(lambda row: {"documents": spill.write(source, row["part"], parts)})
        return int(told.sum("documents"))
    if parts == 1:
        return spill.write(source, 0, 1)
    with ProcessPoolExecutor(parts, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(spill.write, source, part, parts) for part in range(parts)]
        return sum(future.result() for future in futures)


def repackage(
    source: Source,
    name: str,
    *,
    seed: int = 0,
    buckets: int = 256,
    val_documents: int = 10_000,
    workers: int = 1,
    use_ray: bool = False,
) -> Corpus:
    """Make the corpus `name`.

    Args:
        source: the text.
        name: of the corpus folder, which must not exist yet.
        seed: of the order, and so of what is held out.
        buckets: of the first pass; one at a time is held in memory.
        val_documents: held out, at most; one in 100 if there are fewer.
        workers: that read the source.
        use_ray: run them on Ray.

    Raises:
        UserError: the source is unusable or too small, or the corpus is there already.
    """
    folder = files.data_dir(name)
    if folder.exists():
        raise UserError(f"{folder} is there already. Use another --name, or delete it.")
    files.require_writable(folder.parent)
    files.sweep_temporaries(folder.parent)  # what a killed one spilled is as large as the corpus
    what = source.dataset or f"{len(source.paths)} local files"
    scratch = files.temporary(folder.parent / f"spill-{name}")
    scratch.mkdir()
    try:
        spill = Spill(scratch, buckets, seed)
        count = spill_all(spill, source, workers, use_ray)
        print(f"{count:,} documents in {buckets} buckets; sorting and writing them", flush=True)
        documents = spill.read()
        val = _held_out(documents, min(val_documents, max(1, count // 100)))
        with locks.held(files.corpus_lock(name), f"corpus {name!r}"):
            write_corpus(folder, f"repackaged with seed {seed} from {what}", documents, val)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    corpus = Corpus.open(name)
    kept = sum(shard.documents for shard in corpus.shards)
    print(f"{summary(corpus)}; {count - kept:,} duplicates dropped")
    return corpus


def _held_out(documents: Iterator[str], count: int) -> deque[str]:
    """The first documents of the order, at most `count`: the order is a shuffle, so they are a sample."""
    held: deque[str] = deque()
    chars = 0
    while len(held) < count and chars < MAX_VAL_CHARS:
        if (document := next(documents, None)) is None:
            break
        held.append(document)
        chars += len(document)
    return held


@cli
def main() -> None:
    """Read the command line and make the corpus."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--files", nargs="+", default=[], help="parquet, jsonl or txt files or folders")
    parser.add_argument("--dataset", default="", help="a data set of the Hugging Face hub")
    parser.add_argument("--config", help="its configuration")
    parser.add_argument("--split", default="train", help="its split")
    parser.add_argument("--column", default="text", help="its column of text")
    parser.add_argument("--name", required=True, help="of the corpus to make")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--buckets", type=int, default=256, help="more for data of over 100 GB")
    parser.add_argument("--val-documents", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--ray", action="store_true", help="run the workers on Ray Data")
    args = parser.parse_args()
    if bool(args.files) == bool(args.dataset):
        raise UserError("name the text with --files or with --dataset.")
    if min(args.buckets, args.workers, args.val_documents) < 1 or args.seed < 0:
        raise UserError("--buckets, --workers and --val-documents: expected 1 or more; --seed: 0 or more.")
    paths = tuple(sources.find_files(args.files, "")[0]) if args.files else ()
    repackage(
        Source(paths, args.dataset, args.config, args.split, args.column),
        args.name,
        seed=args.seed,
        buckets=args.buckets,
        val_documents=args.val_documents,
        workers=args.workers,
        use_ray=args.ray,
    )


if __name__ == "__main__":
    main()
