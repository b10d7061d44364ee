"""Memory and time of repackaging a large corpus, which is made for it and deleted again.

    python -m dev.bench.repackage --gigabytes 5 [--json FILE]

One document in twenty is there twice. The corpus is packed twice, from differently ordered parts: the shards
have to be the same. Needs three times its size on the disk of NANOCHAT_BASE_DIR.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dev.repackage_data import Source, repackage
from nanochat.common import files

FILE_BYTES = 1 << 28  # of text in a file
MEAN_CHARS = 4000


def make(folder: Path, n_bytes: int) -> int:
    """Write parquet files of pseudo-text of log-normal lengths; returns the number of different documents."""
    random = np.random.default_rng(0)
    letters = random.choice(np.frombuffer(b"eeeettaaooinnshrdlu      ", np.uint8), 1 << 24)
    text = letters.tobytes().decode()
    serial = made = 0
    for number in range(-(-n_bytes // FILE_BYTES)):
        documents: list[str] = []
        size = 0
        while size < min(FILE_BYTES, n_bytes - made):
            length = int(min(100_000, random.lognormal(np.log(MEAN_CHARS) - 0.5, 1.0)))
            start = int(random.integers(len(text) - length))
            documents.append(f"{serial} {text[start : start + length]}")
            size += length
            serial += 1
        made += size
        repeated = documents[::20]
        table = pa.table({"text": [*documents, *repeated]})
        pq.write_table(table, folder / f"{number:04d}.parquet", compression="zstd", row_group_size=1000)
    return serial


def measure(folder: Path, name: str, backwards: bool) -> None:
    """One repackaging, in a process of its own; prints what it took."""
    started = time.perf_counter()
    paths = sorted(folder.glob("*.parquet"), reverse=backwards)
    corpus = repackage(Source(tuple(paths)), name, seed=1)
    documents = sum(shard.documents for shard in corpus.shards)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    print(corpus.fingerprint, documents, peak, round(time.perf_counter() - started, 1))


def main() -> None:
    """Make the text, pack it twice, print and check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=5.0)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        folder, name, backwards = args.measure
        measure(Path(folder), name, backwards == "backwards")
        return
    files.base_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=files.base_dir()) as temporary:
        base = Path(temporary)
        (base / "in").mkdir()
        unique = make(base / "in", int(args.gigabytes * 1e9))
        told = []
        for name in ("forwards", "backwards"):
            command = [sys.executable, "-m", "dev.bench.repackage", "--measure", str(base / "in"), name, name]
            environment = {**os.environ, "NANOCHAT_BASE_DIR": str(base)}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            fingerprint, documents, peak, seconds = done.stdout.splitlines()[-1].split()
            assert int(documents) == unique, f"{documents} documents of {unique}"
            told.append((fingerprint, int(peak), float(seconds)))
            print(
                f"{name}: {documents} documents, peak memory {int(peak) / 1e6:.0f} MB, {seconds} s",
                flush=True,
            )
    assert told[0][0] == told[1][0], "the two runs gave different shards"
    print(f"the same shards both times: {told[0][0]}")
    if args.json:
        most, least_s = max(t[1] for t in told), min(t[2] for t in told)
        rows = [
            {"metric": "peak_memory", "ours": most, "unit": "bytes"},
            {"metric": "text_per_second", "ours": args.gigabytes * 1e9 / least_s, "unit": "bytes/s"},
        ]
        no_peer = {"peer": None, "theirs": None, "ratio": None}
        machine = {"cpu": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
        files.write_json(args.json, {"machine": machine, "rows": [{**row, **no_peer} for row in rows]})


if __name__ == "__main__":
    main()
