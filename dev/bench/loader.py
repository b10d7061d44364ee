"""Batches for training, per second: our loader beside a straightforward one (tiktoken, best-fit in Python).

    python -m dev.bench.loader --files FOLDER_OF_PARQUET [--json FILE]

Both read the same shards with the same vocabulary and give rows of T + 1 tokens as int64 tensors. Each
measurement is a process of its own, from its first read to its last batch; ours and theirs take turns. The
reference crops little until long documents have filled its buffer: its fourth pass over three shards counts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanochat.common import files
from nanochat.common.machine import peak_memory_bytes
from nanochat.data import parquet_shards, sources, tokenizer_texts
from nanochat.data.corpus import Corpus
from nanochat.data.packing import plan_rows
from nanochat.data.train_loader import TrainLoader
from nanochat.distributed.world import World
from nanochat.tokenizer.tokenizer import Tokenizer

T = 2048
ROWS = 32  # of a batch
LANES = 8
VOCAB = 32768
TRAIN_CHARS = 50_000_000  # of text, for the vocabulary
OUR_TOKENS, THEIR_TOKENS = 60_000_000, 4_000_000  # of a measurement
BUFFER_DOCUMENTS, BATCH_DOCUMENTS = 1000, 128  # of the reference
UNITS = {"tokens_per_second": "tokens/s", "cropped_share": "share of tokens", "peak_memory": "bytes"}


def corpus_of(folder: Path, suffix: str = ".parquet") -> Corpus:
    """The shards of a folder; the last is validation."""
    paths = sorted(folder.glob(f"*{suffix}"))
    splits = ["train"] * (len(paths) - 1) + ["val"]
    members = [parquet_shards.describe(path, split) for path, split in zip(paths, splits, strict=True)]
    return Corpus(folder, "bench", "local files", members)


def ours(corpus: Corpus, tokenizer: Tokenizer, threads: int) -> dict[str, float]:
    """Our loader, from opening it to its last batch."""
    started = time.perf_counter()
    loader = TrainLoader(
        corpus,
        tokenizer,
        sequence_len=T,
        rows_per_batch=ROWS,
        streams=LANES,
        seed=0,
        world=World.single_process(),
        device_batch_size=ROWS,
        threads=threads,
    )
    tokens = 0
    while tokens < OUR_TOKENS:
        tokens += sum(batch.inputs.numel() for batch in loader.next_batch())
    seconds = time.perf_counter() - started
    loader.close()
    return {"tokens_per_second": tokens / seconds, "cropped_share": our_cropped_share(corpus, tokenizer)}


def our_cropped_share(corpus: Corpus, tokenizer: Tokenizer) -> float:
    """Of the first row groups, from where packing takes its tokens."""
    offered = kept = 0
    for shard in corpus.train_shards[:3]:
        for group in range(shard.row_groups):
            _, offsets = tokenizer.encode_batch(corpus.read_block(shard, group))
            offered += int(offsets[-1])
            kept += sum(segment.tokens for segment in plan_rows(np.diff(offsets), T + 1, keep_tails=False)[0])
    return 1 - kept / offered


def theirs(corpus: Corpus, tokenizer: Tokenizer, threads: int) -> dict[str, float]:
    """The reference: documents are tokenized 128 at a time and placed by a scan of a buffer."""
    import tiktoken

    ranks = dict(tokenizer._bpe.get_mergeable_ranks())
    encoding = tiktoken.Encoding(
        "bench", pat_str=tokenizer.pattern, mergeable_ranks=ranks, special_tokens={"<|bos|>": len(ranks)}
    )
    started = time.perf_counter()
    packer = BufferedBestFit(_encoded(corpus, encoding, len(ranks), threads))
    tokens = 0
    while tokens < THEIR_TOKENS:
        batch = torch.tensor([packer.row() for _ in range(ROWS)], dtype=torch.int64)
        tokens += batch[:, :-1].contiguous().numel()
        batch[:, 1:].contiguous()
    seconds = time.perf_counter() - started
    share = their_cropped_share(corpus, tokenizer) if threads == 2 else 0.0  # the same for any number
    return {"tokens_per_second": tokens / seconds, "cropped_share": share}


class BufferedBestFit:
    """Rows from a buffer of documents: the longest that fits, found by a scan; else the shortest, cropped."""

    def __init__(self, documents: Iterator[list[Sequence[int]]]) -> None:
        """`documents` come in batches, each with its BOS."""
        self._documents = documents
        self._buffer: list[Sequence[int]] = []
        self.used = self.cropped = 0

    def row(self) -> list[int]:
        """The next T + 1 tokens.

        Raises:
            StopIteration: the documents have run out.
        """
        row: list[int] = []
        while len(row) < T + 1:
            while len(self._buffer) < BUFFER_DOCUMENTS:
                self._buffer.extend(next(self._documents))
            space = T + 1 - len(row)
            best = -1
            for i, document in enumerate(self._buffer):
                if len(document) <= space and (best < 0 or len(document) > len(self._buffer[best])):
                    best = i
            if best < 0:
                best = min(range(len(self._buffer)), key=lambda i: len(self._buffer[i]))
            document = self._buffer.pop(best)
            self.used += len(document) - 1
            self.cropped += max(0, len(document) - space)
            row.extend(document[:space])
        return row


def their_cropped_share(corpus: Corpus, tokenizer: Tokenizer) -> float:
    """Of the fourth pass, when long documents fill the buffer; a range stands for one: its length counts."""
    batches: list[list[Sequence[int]]] = []
    for shard in corpus.train_shards[:3]:
        for group in range(shard.row_groups):
            _, offsets = tokenizer.encode_batch(corpus.read_block(shard, group))
            batches.append([range(1 + n) for n in (offsets[1:] - offsets[:-1]).tolist()])
    epoch = sum(len(document) - 1 for batch in batches for document in batch)
    packer = BufferedBestFit(itertools.cycle(batches))
    while packer.used < 3 * epoch:
        packer.row()
    used, cropped = packer.used, packer.cropped
    while packer.used < 4 * epoch:
        packer.row()
    return (packer.cropped - cropped) / (packer.used - used)


def _encoded(corpus: Corpus, encoding: Any, bos: int, threads: int) -> Iterator[list[Sequence[int]]]:
    while True:
        for shard in corpus.train_shards:
            for group in range(shard.row_groups):
                texts = corpus.read_block(shard, group)
                for at in range(0, len(texts), BATCH_DOCUMENTS):
                    part = texts[at : at + BATCH_DOCUMENTS]
                    ids = encoding.encode_ordinary_batch(part, num_threads=threads)
                    yield [[bos, *document] for document in ids]


def measure(folder: Path, tokenizer_folder: Path, who: str, threads: int) -> dict[str, float]:
    """One measurement, in this process."""
    torch.set_num_threads(1)
    corpus, tokenizer = corpus_of(folder), Tokenizer.load(tokenizer_folder)
    found = (ours if who == "ours" else theirs)(corpus, tokenizer, threads)
    return {**found, "peak_memory": peak_memory_bytes()}


def run(folder: Path, tokenizer_folder: Path, rounds: int) -> list[dict[str, Any]]:
    """All measurements, ours and theirs in turn; medians over the rounds."""
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    for _ in range(rounds):
        for threads in (1, 2):
            for who in ("ours", "theirs"):
                command = [sys.executable, "-m", "dev.bench.loader", "--files", str(folder)]
                command += ["--measure", who, str(threads), str(tokenizer_folder)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found.setdefault((who, threads), []).append(json.loads(done.stdout.splitlines()[-1]))

    def row(metric: str, key: str, threads: int, more_is_better: bool) -> dict[str, Any]:
        mine, other = (statistics.median(x[key] for x in found[who, threads]) for who in ("ours", "theirs"))
        ratio = mine / other if more_is_better else other / mine
        unit = UNITS[key]
        figures = {"ours": mine, "theirs": other, "ratio": ratio}
        return {"metric": metric, "peer": "reference", **figures, "unit": unit}

    return [
        row("tokens_per_second_1t", "tokens_per_second", 1, more_is_better=True),
        row("tokens_per_second_2t", "tokens_per_second", 2, more_is_better=True),
        row("cropped_share", "cropped_share", 2, more_is_better=False),
        row("peak_memory", "peak_memory", 2, more_is_better=False),
    ]


def write_stdlib(folder: Path) -> None:
    """Python's own sources as shards, where no others are named."""
    train, val = sources.stdlib_documents()
    parquet_shards.write_shards(train, folder, "train", 0)
    parquet_shards.write_shards(val, folder, "val", 99999)


def prepare(folder: Path, corpus: Corpus) -> None:
    """Train the vocabulary that both use."""
    texts = tokenizer_texts.columns(corpus, max_chars=TRAIN_CHARS, doc_cap=10_000)
    Tokenizer.train(texts, VOCAB).save(folder)


def main() -> None:
    """Measure, print a table, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--files", type=Path, help="folder of parquet shards; by default Python's own sources"
    )
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        who, threads, tokenizer_folder = args.measure
        print(json.dumps(measure(args.files, Path(tokenizer_folder), who, int(threads))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.files or Path(temporary)
        if args.files is None:
            write_stdlib(folder)
        prepare(Path(temporary) / "tokenizer", corpus_of(folder))
        rows = run(folder, Path(temporary) / "tokenizer", args.rounds)
    print(f"{'metric':24}{'ours':>14}{'reference':>14}{'ratio':>8}  unit")
    for row in rows:
        values = [
            f"{row[who]:14,.3f}" if row[who] < 10 else f"{row[who]:14,.0f}" for who in ("ours", "theirs")
        ]
        print(f"{row['metric']:24}{''.join(values)}{row['ratio']:8.2f}  {row['unit']}")
    if args.json:
        machine = {"cpu": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
        files.write_json(args.json, {"machine": {**machine, "torch": torch.__version__}, "rows": rows})


if __name__ == "__main__":
    main()
