"""Shards of tokens made by the tests, in the format of llm.c, written here from its description."""

from __future__ import annotations

import random
import struct

import numpy as np
from numpy.typing import ArrayLike

from nanochat.common import files
from nanochat.data import parquet_shards
from nanochat.data.corpus import Corpus
from nanochat.tokenizer.tokenizer import Tokenizer

NAME = "fineweb10B-gpt2"


def shard_bytes(
    tokens: ArrayLike, magic: int = 20240520, version: int = 1, count: int | None = None
) -> bytes:
    """A file of tokens; its header lies where `count` is given."""
    ids = np.asarray(tokens, np.uint16)
    header = struct.pack("<3i", magic, version, ids.size if count is None else count)
    return header.ljust(1024, b"\0") + ids.astype("<u2").tobytes()


def make_corpus(train: list[ArrayLike], val: ArrayLike, name: str = NAME) -> Corpus:
    """A corpus of tokens in the base directory of the test."""
    folder = files.data_dir(name)
    folder.mkdir(parents=True)
    members = []
    for split, number, tokens in [*(("train", i, t) for i, t in enumerate(train, 1)), ("val", 0, val)]:
        path = folder / f"fineweb_{split}_{number:06d}.bin"
        path.write_bytes(shard_bytes(tokens))
        members.append(parquet_shards.describe(path, split))
    Corpus(folder, name, "kjj0/fineweb10B-gpt2@0", members).write_manifest(folder)
    return Corpus.open(name)


def token_stream(tokenizer: Tokenizer, texts: list[str]) -> list[int]:
    """Documents as llm.c writes them: each behind the token that ends texts, which is BOS here."""
    return [token for text in texts for token in tokenizer.encode(text, bos=True)]


def sentences(count: int, words: list[str], seed: int = 0) -> list[str]:
    """Documents of a few words."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(words, k=rng.randint(5, 60))) for _ in range(count)]
