"""Training, encoding and decoding beside PyPI's rustbpe, tokenizers and tiktoken, on the same text.

    python -m dev.bench.tokenizer --data FOLDER_OF_PARQUET [--stress FOLDER] [--json FILE]

Every contestant runs in a process of its own; they take turns, A B A B, and medians over the rounds count.
Training starts each round in new processes, which hold the text already; memory is what comes on top of it.
PyPI's package has our module's name: it is installed into a folder of its own (--peers).
`--clock cpu` takes processor time: for one thread, on a machine that others use too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rustbpe
from nanochat.common import files
from nanochat.data import parquet_shards, sources
from nanochat.tokenizer.tokenizer import PATTERN, Tokenizer

VOCAB = 32768
TRAINERS = ("ours", "rustbpe", "tokenizers")
CODERS = ("ours", "rustbpe", "tokenizers", "tiktoken")
PEER = "rustbpe==0.1.0"
Answer = dict[str, Any]


class Process:
    """A contestant that is running."""

    def __init__(self, who: str, threads: int, folder: Path, megabytes: float, peers: Path) -> None:
        """Start it; it reads its texts."""
        environment = {
            **os.environ,
            "RAYON_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "true" if threads > 1 else "false",
            "OMP_NUM_THREADS": "1",
        }
        if who == "rustbpe":
            environment["PYTHONPATH"] = str(peers)
        command = [sys.executable, "-m", "dev.bench.contestants", who, str(threads), str(folder)]
        self._process = subprocess.Popen(
            [*command, str(megabytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ask(self, order: str, **arguments: Any) -> Answer:
        """Give an order and wait for the answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([order, arguments]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self._process.args} ended: see above")
        found: Answer = json.loads(answer)
        return found

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *problem: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class Bench:
    """All measurements of one run, and the rows of its table."""

    def __init__(self, args: argparse.Namespace, folder: Path, scratch: Path) -> None:
        self.args = args
        self.folder = folder
        self.scratch = scratch
        self.rows: list[Answer] = []

    def process(self, who: str, threads: int, megabytes: float) -> Process:
        """Start a contestant."""
        return Process(who, threads, self.folder, megabytes, self.args.peers)

    def row(self, metric: str, peer: str | None, ours: float, theirs: float, unit: str) -> Answer:
        """Add a row. `unit` says which is better: more per second, fewer bytes."""
        ratio = theirs / ours if unit == "bytes" else ours / theirs
        found = {"metric": metric, "peer": peer, "ours": ours, "theirs": theirs, "ratio": ratio, "unit": unit}
        self.rows.append(found)
        return found

    def speed(self, answers: list[Answer], size: int) -> float:
        """Median, in MB/s."""
        return size / statistics.median(answer[self.args.clock] for answer in answers) / 1e6

    def training(self) -> list[str]:
        """Speed, memory and equality of vocabularies; returns our tokens, as hexadecimal."""
        found: dict[str, list[Answer]] = {who: [] for who in TRAINERS}
        for turn in range(self.args.rounds):
            for who in TRAINERS:
                with self.process(who, self.args.threads, self.args.train_mb) as process:
                    found[who].append(process.ask("train", vocab_size=VOCAB - 9, pattern=PATTERN))
                print(
                    f"training {turn + 1}/{self.args.rounds}: {who} {found[who][-1]['wall']:.1f} s",
                    flush=True,
                )
        size = found["ours"][0]["bytes"]
        vocabularies = {answer["vocabulary"] for answer in found["ours"]}
        assert len(vocabularies) == 1, "our vocabulary changes from run to run"
        memory = {who: statistics.median(answer["over"] for answer in found[who]) for who in TRAINERS}
        for who in TRAINERS[1:]:
            ours, theirs = self.speed(found["ours"], size), self.speed(found[who], size)
            same = found[who][0]["vocabulary"] in vocabularies
            self.row("train_speed", who, ours, theirs, "MB/s")["same_vocabulary"] = same
            self.row("train_memory", who, memory["ours"], memory[who], "bytes")
        with self.process("ours", self.args.threads, self.args.train_mb) as process:
            times = max(1, round(1e9 / size))
            answer = process.ask("train", vocab_size=VOCAB - 9, pattern=PATTERN, times=times)
        gigabyte = self.row("train_memory_gigabyte", None, answer["total"], 2e9, "bytes")
        gigabyte["text_bytes"] = answer["bytes"]
        tokens: list[str] = found["ours"][0]["tokens"]
        return tokens

    def coding(self, tokens: list[str]) -> None:
        """Speed of encoding on one thread and on several, of decoding, and on texts that are hard."""
        ranks_file = self.scratch / "tokens"
        ranks_file.write_text("\n".join(tokens))
        ranks = {bytes.fromhex(token): rank for rank, token in enumerate(tokens)}
        Tokenizer(rustbpe.Tokenizer.from_ranks(ranks, PATTERN)).save(self.scratch)
        vocabulary = {
            "ranks_file": str(ranks_file),
            "json_file": str(self.scratch / "tokenizer.json"),
            "pattern": PATTERN,
        }
        self.encoding(vocabulary, 1)
        self.encoding(vocabulary, self.args.threads)
        self.scaling(vocabulary)

    def scaling(self, vocabulary: dict[str, str]) -> None:
        """Our own encoding on several threads beside one, in turns."""
        threads = self.args.threads
        with self.process("ours", threads, self.args.encode_mb) as process:
            size = process.ask("load", **vocabulary)["bytes"]
            turns = [
                (process.ask("encode"), process.ask("encode", threads=1)) for _ in range(self.args.rounds)
            ]
        together, alone = (self.speed([turn[i] for turn in turns], size) for i in (0, 1))
        self.row(f"encode_speed_{threads}t", "ours, one thread", together, alone, "MB/s")

    def encoding(self, vocabulary: dict[str, str], threads: int) -> None:
        """Rows of encoding on some threads; with one, of decoding too."""
        processes = {who: self.process(who, threads, self.args.encode_mb) for who in CODERS}
        encoded: dict[str, list[Answer]] = {who: [] for who in CODERS}
        decoded: dict[str, list[Answer]] = {"ours": [], "tiktoken": []}
        size = 0
        for who, process in processes.items():
            if who == "rustbpe":
                process.ask("train", vocab_size=VOCAB - 9, pattern=PATTERN)
            size = process.ask("load", **vocabulary)["bytes"]
            process.ask("encode")
        for _ in range(self.args.rounds):
            for who, process in processes.items():
                encoded[who].append(process.ask("encode"))
            for who in decoded if threads == 1 else ():
                decoded[who].append(processes[who].ask("decode"))
        ours = self.speed(encoded["ours"], size)
        wanted = encoded["ours"][0]["digest"]
        for who in CODERS[1:]:
            row = self.row(f"encode_speed_{threads}t", who, ours, self.speed(encoded[who], size), "MB/s")
            # PyPI's rustbpe cannot load a vocabulary and has one of the sample.
            row["same_ids"] = None if who == "rustbpe" else encoded[who][0]["digest"] == wanted
        if threads == 1:
            mine, theirs = (self.speed(answers, size) for answers in decoded.values())
            row = self.row("decode_speed", "tiktoken", mine, theirs, "MB/s")
            row["same_text"] = all(answer["same"] for answer in [*decoded["ours"], *decoded["tiktoken"]])
            self.adversarial(processes["ours"], size / min(a["cpu"] for a in encoded["ours"]) / 1e6)
        for process in processes.values():
            process.__exit__()

    def adversarial(self, process: Process, prose: float) -> None:
        """The slowest of the hard texts beside the data's own speed; the others in the row's `cases`."""
        speeds: dict[str, float] = process.ask("adversarial", stress=str(self.args.stress or ""))["speeds"]
        worst = min(speeds, key=lambda name: speeds[name])
        row = self.row("adversarial_speed", "own prose speed", speeds[worst], prose, "MB/s")
        row["cases"] = {name: round(speed, 1) for name, speed in speeds.items()}


def install_peers(folder: Path) -> None:
    """PyPI's rustbpe into a folder of its own, unless it is there."""
    if not (folder / "rustbpe").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([*command, PEER], check=True)


def table(rows: Sequence[Answer]) -> None:
    """Print rows; what was checked, after each."""
    print(f"{'metric':24}{'peer':18}{'ours':>12}{'theirs':>12}{'ratio':>8}  unit")
    for row in rows:
        scale, unit = (1e6, "MB") if row["unit"] == "bytes" else (1.0, row["unit"])
        known = ("metric", "peer", "ours", "theirs", "ratio", "unit", "cases")
        checked = "; ".join(f"{key.replace('_', ' ')}: {row[key]}" for key in row if key not in known)
        figures = f"{row['ours'] / scale:12,.1f}{row['theirs'] / scale:12,.1f}{row['ratio']:8.2f}"
        print(f"{row['metric']:24}{row['peer'] or '-':18}{figures}  {unit:5} {checked}")
        for name, speed in row.get("cases", {}).items():
            print(f"    {name:38}{speed:12,.1f}  MB/s")


def arguments() -> argparse.Namespace:
    """What the user asks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of parquet shards; by default Python's own sources")
    parser.add_argument(
        "--stress", type=Path, help="folder of hard texts; by default `stress` beside the data"
    )
    parser.add_argument(
        "--peers", type=Path, default=files.base_dir() / "peers", help="home of PyPI's rustbpe"
    )
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--train-mb", type=float, default=1e9, help="text to train on; all by default")
    parser.add_argument("--encode-mb", type=float, default=20.0, help="text to encode")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    args = parser.parse_args()
    if args.stress is None and args.data and (args.data.parent / "stress").is_dir():
        args.stress = args.data.parent / "stress"
    return args


def main() -> None:
    """Measure, print a table, and write JSON where asked."""
    args = arguments()
    install_peers(args.peers)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.data
        if folder is None:
            folder = Path(temporary)
            parquet_shards.write_shards(sources.stdlib_documents()[0], folder, "train", 0)
        bench = Bench(args, folder, Path(temporary))
        bench.coding(bench.training())
    table(bench.rows)
    if args.json:
        machine = {"cpu": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
        files.write_json(args.json, {"machine": {**machine, "clock": args.clock}, "rows": bench.rows})


if __name__ == "__main__":
    main()
