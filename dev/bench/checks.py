"""What it costs the loader to compare every block with its checksums: with them and without, in turn.

    python -m dev.bench.checks [--files FOLDER_OF_PARQUET] [--rounds 9] [--json FILE]

Each measurement is a process of its own, of which the opening of the loader and its first batch do not count.
The share of the process's time is the figure; the rates beside it scatter by more than that from run to run.
The shards of tokens are made for it; their ids are random, which the loader does not look at.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dev.bench.loader import corpus_of, prepare, write_stdlib
from nanochat.common import checksums, files
from nanochat.data import token_shards
from nanochat.data.train_loader import TrainLoader
from nanochat.distributed.world import World
from nanochat.tokenizer.tokenizer import Tokenizer

T = 2048
ROWS = 256
LANES = 16
THREADS = 2
TOKENS = {".parquet": 60_000_000, token_shards.SUFFIX: 600_000_000}  # of a measurement: a few seconds
SHARD_TOKENS = 100_000_000  # as FineWeb's shards of GPT-2's ids have
GPT2_VOCAB, GPT2_BOS = 50257, 50256


class Ids:
    """What the loader asks of a vocabulary whose shards are ids already."""

    vocab_size, bos_id = GPT2_VOCAB, GPT2_BOS


def make_tokens(folder: Path) -> None:
    """Three shards of training and a small one of validation."""
    rng = np.random.default_rng(0)
    for number, count in enumerate((SHARD_TOKENS, SHARD_TOKENS, SHARD_TOKENS, 1_000_000)):
        header = np.zeros(token_shards.HEADER_BYTES // 4, "<i4")
        header[:3] = token_shards.MAGIC, token_shards.VERSION, count
        ids = rng.integers(0, GPT2_VOCAB, count, dtype=np.uint16).astype("<u2")
        (folder / f"{number}{token_shards.SUFFIX}").write_bytes(header.tobytes() + ids.tobytes())


def measure(folder: Path, suffix: str, tokenizer: Path, compared: bool) -> dict[str, float]:
    """Tokens a second, and the share of the process's time that checksums take, in this process."""
    torch.set_num_threads(1)
    real, spent = checksums._checksums, [0.0]

    def timed(data: memoryview) -> list[int]:
        began = time.thread_time()
        found = real(data) if compared else []
        spent[0] += time.thread_time() - began
        return found

    checksums._checksums = timed
    loader = TrainLoader(
        corpus_of(folder, suffix),
        Tokenizer.load(tokenizer) if suffix == ".parquet" else Ids(),  # type: ignore[arg-type]
        sequence_len=T,
        rows_per_batch=ROWS,
        streams=LANES,
        seed=0,
        world=World.single_process(),
        device_batch_size=ROWS // 8,
        threads=THREADS,
    )
    loader.next_batch()
    began, worked, tokens, spent[0] = time.perf_counter(), time.process_time(), 0, 0.0
    while tokens < TOKENS[suffix]:
        tokens += sum(batch.inputs.numel() for batch in loader.next_batch())
    seconds, busy = time.perf_counter() - began, time.process_time() - worked
    loader.close()
    return {"tokens_per_second": tokens / seconds, "share_percent": 100 * spent[0] / busy}


def run(folder: Path, suffix: str, tokenizer: Path, rounds: int) -> dict[str, Any]:
    """Medians over the rounds, with the rates of all, which scatter by more than the checksums cost."""
    found: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    for number in range(rounds):
        for compared in (number % 2 == 0, number % 2 == 1):
            command = [sys.executable, "-m", "dev.bench.checks", "--files", str(folder), "--measure"]
            command += [suffix, str(tokenizer), str(int(compared))]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr)
            found[compared].append(json.loads(done.stdout.splitlines()[-1]))
    rates = {kind: [each["tokens_per_second"] for each in found[kind]] for kind in found}
    return {
        "shards": suffix,
        "share_percent": statistics.median(each["share_percent"] for each in found[True]),
        "compared": statistics.median(rates[True]),
        "not_compared": statistics.median(rates[False]),
        "compared_all": rates[True],
        "not_compared_all": rates[False],
    }


def main() -> None:
    """Measure, print a table, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--files", type=Path, help="folder of parquet; by default Python's own sources")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        suffix, tokenizer, compared = args.measure
        print(json.dumps(measure(args.files, suffix, Path(tokenizer), compared == "1")))
        return
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        texts = args.files or scratch
        if args.files is None:
            write_stdlib(texts)
        prepare(scratch / "tokenizer", corpus_of(texts))
        make_tokens(scratch)
        for folder, suffix in ((texts, ".parquet"), (scratch, token_shards.SUFFIX)):
            rows.append(run(folder, suffix, scratch / "tokenizer", args.rounds))
    print(f"{'shards':10}{'share of time':>15}{'tokens/s':>14}{'without':>14}{'ratio':>8}")
    for row in rows:
        rates = f"{row['compared']:14,.0f}{row['not_compared']:14,.0f}"
        ratio = row["compared"] / row["not_compared"]
        print(f"{row['shards']:10}{row['share_percent']:14.2f}%{rates}{ratio:8.3f}")
    if args.json:
        files.write_json(args.json, {"rounds": args.rounds, "rows": rows})


if __name__ == "__main__":
    main()
