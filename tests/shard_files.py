"""Shards on the disk as others write them, and as tests read them without a corpus."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import files
from nanochat.common.checksums import ChecksummedFile
from nanochat.data import parquet_shards
from nanochat.data.corpus import Corpus
from tests.token_files import make_corpus

KINDS = ("zstd", "snappy", "none", "tokens")  # parquet as the hub has it, by its compression; shards of ids


def read_texts(path: Path, row_group: int) -> list[str]:
    """The documents of a row group of a file as it is now."""
    texts: list[str] = parquet_shards.read_column(ChecksummedFile(path), row_group).to_pylist()
    return texts


def flip(path: Path, bit: int) -> None:
    """Turn one bit of a file over, in its place; a second time puts it back."""
    with path.open("r+b") as file:
        file.seek(bit // 8)
        [byte] = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def bits_of(path: Path, count: int, seed: int) -> list[int]:
    """Random bits of a file."""
    rng, bits = random.Random(seed), 8 * path.stat().st_size
    return [rng.randrange(bits) for _ in range(count)]


def documents_of(count: int, first: int = 0) -> list[str]:
    """Texts of some 500 characters that do not compress away."""
    return [
        f"document {i}: " + " ".join(hashlib.sha256(f"{i} {k}".encode()).hexdigest() for k in range(7))
        for i in range(first, first + count)
    ]


def write_like_the_hub(path: Path, documents: list[str], compression: str = "zstd", rows: int = 200) -> None:
    """A shard written with the arguments of those on the hub: without page checksums."""
    table = pa.table({"text": documents})
    level = 3 if compression == "zstd" else None
    pq.write_table(
        table,
        path,
        row_group_size=rows,
        use_dictionary=False,
        compression=compression,
        compression_level=level,
        write_statistics=False,
    )


def foreign_corpus(kind: str, name: str = "fineweb-edu") -> Corpus:
    """A corpus of one of KINDS: a training shard of several blocks and pieces, and validation."""
    if kind == "tokens":
        ids = np.random.PCG64(0).random_raw(300_000) % 250
        return make_corpus([ids], ids[:5000])
    folder = files.data_dir(name)
    folder.mkdir(parents=True)
    members = []
    for index, (split, count) in enumerate((("train", 600), ("val", 50))):
        path = folder / f"shard_{index:05d}.parquet"
        write_like_the_hub(path, documents_of(count, 1000 * index), kind)
        members.append(parquet_shards.describe(path, split))
    Corpus(folder, name, "karpathy/fineweb-edu-100b-shuffle@x", members).write_manifest(folder)
    return Corpus.open(name)
