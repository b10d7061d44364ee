"""One contestant of `dev.bench.tokenizer`, in a process of its own: orders and answers are lines of JSON.

    python -m dev.bench.contestants ours|rustbpe|tokenizers|tiktoken THREADS FOLDER MEGABYTES

The module named `rustbpe` is whichever comes first on the path, so nothing of nanochat is imported here.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

Answer = dict[str, Any]


def documents(folder: Path) -> Iterator[str]:
    """Texts of all parquet files of a folder, a row group at a time."""
    for path in sorted(folder.glob("*.parquet")):
        with pq.ParquetFile(path) as file:
            for group in range(file.metadata.num_row_groups):
                yield from file.read_row_group(group, columns=["text"]).column(0).to_pylist()


def read(folder: Path, megabytes: float) -> list[str]:
    """Texts up to about this many million characters."""
    texts, left = [], megabytes * 1e6
    for text in documents(folder):
        if left <= 0:
            break
        texts.append(text)
        left -= len(text)
    return texts


class Peak:
    """Peak resident memory of this process since `reset`; Linux tells."""

    def reset(self) -> None:
        """Forget the peak until now."""
        Path("/proc/self/clear_refs").write_text("5")
        self.before = self._of("VmRSS")

    def over(self) -> int:
        """Bytes above what was held at the reset."""
        return self._of("VmHWM") - self.before

    @staticmethod
    def total() -> int:
        """Peak of the whole process, in bytes."""
        return Peak._of("VmHWM")

    @staticmethod
    def _of(key: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
        raise SystemExit(f"/proc/self/status has no {key}: this measurement needs Linux")


def timed(work: Callable[[], Any]) -> tuple[Any, Answer]:
    """What `work` returns, and its wall-clock and processor seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def timed_warm(work: Callable[[], Any]) -> tuple[Any, Answer]:
    """What `work` returns, and the medians of calls that take a second in all, after one that does not count.

    While the others have their turns a process sits idle for seconds, and its first calls after that are
    slower: ours encodes 114 MB/s where it encodes 132 a moment later.
    """
    work()
    times: list[Answer] = []
    while sum(time["wall"] for time in times) < 1:
        result, answer = timed(work)
        times.append(answer)
    return result, {clock: statistics.median(time[clock] for time in times) for clock in ("wall", "cpu")}


def digest(ids: list[Any]) -> str:
    """Of all ids end to end."""
    whole = hashlib.sha256()
    for part in ids:
        whole.update(np.asarray(part, dtype=np.uint32).tobytes())
    return whole.hexdigest()


class Contestant:
    """Trains, encodes and decodes with one of the packages."""

    def __init__(self, who: str, threads: int, folder: Path, megabytes: float) -> None:
        """Texts are read once; the vocabulary is loaded by `load`."""
        self.who = who
        self.threads = threads
        self.texts = read(folder, megabytes)
        self.bytes = sum(len(text.encode()) for text in self.texts)
        self.coder: Any = None

    def train(self, vocab_size: int, pattern: str, times: int = 1) -> Answer:
        """Train on all texts, which are held already, `times` times over."""
        texts = (text for _ in range(times) for text in self.texts)
        peak = Peak()
        peak.reset()
        ranks, answer = timed(lambda: self._train(texts, vocab_size, pattern))
        tokens = [token.hex() for token, _ in sorted(ranks, key=lambda pair: pair[1])]
        found = {"over": peak.over(), "total": peak.total(), "bytes": self.bytes * times}
        vocabulary = hashlib.sha256("\n".join(tokens).encode()).hexdigest()
        return {**answer, **found, "vocabulary": vocabulary, "tokens": tokens}

    def _train(self, texts: Iterator[str], vocab_size: int, pattern: str) -> list[tuple[bytes, int]]:
        if self.who in ("ours", "rustbpe"):
            import rustbpe

            self.coder = rustbpe.Tokenizer()
            more = {"num_threads": self.threads} if self.who == "ours" else {}
            self.coder.train_from_iterator(texts, vocab_size, pattern=pattern, **more)
            return [(bytes(token), rank) for token, rank in self.coder.get_mergeable_ranks()]
        import tokenizers
        from tokenizers import models, pre_tokenizers, trainers

        self.coder = tokenizers.Tokenizer(models.BPE())
        split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self.coder.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
        self.coder.train_from_iterator(texts, trainer)
        return [(token.encode(), rank) for token, rank in self.coder.get_vocab().items()]

    def load(self, ranks_file: str, json_file: str, pattern: str) -> Answer:
        """Take the common vocabulary. PyPI's rustbpe cannot load one; it trains, to the same one."""
        tokens = [bytes.fromhex(line) for line in Path(ranks_file).read_text().split("\n")]
        ranks = {token: rank for rank, token in enumerate(tokens)}
        if self.who == "ours":
            import rustbpe

            self.coder = rustbpe.Tokenizer.from_ranks(ranks, pattern)
        elif self.who == "tiktoken":
            import tiktoken

            self.coder = tiktoken.Encoding("bench", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        elif self.who == "tokenizers":
            import tokenizers

            self.coder = tokenizers.Tokenizer.from_file(json_file)
        return {"bytes": self.bytes}

    def encode(self, threads: int | None = None) -> Answer:
        """All texts, one by one where the package has one thread only."""
        coder, texts, threads = self.coder, self.texts, threads or self.threads
        work: dict[str, Callable[[], Any]] = {
            "ours": lambda: coder.encode_batch_numpy(texts, num_threads=threads)[0],
            "rustbpe": lambda: (
                [coder.encode(text) for text in texts] if threads == 1 else coder.batch_encode(texts)
            ),
            "tokenizers": lambda: [part.ids for part in coder.encode_batch_fast(texts)],
            "tiktoken": lambda: (
                [coder.encode_ordinary(text) for text in texts]
                if threads == 1
                else coder.encode_ordinary_batch(texts, num_threads=threads)
            ),
        }
        ids, answer = timed_warm(work[self.who])
        return {**answer, "digest": digest([ids] if self.who == "ours" else ids)}

    def decode(self) -> Answer:
        """The ids of each text, as a list."""
        encode = self.coder.encode_ordinary if self.who == "tiktoken" else self.coder.encode
        ids = [encode(text) for text in self.texts]
        texts, answer = timed_warm(lambda: [self.coder.decode(part) for part in ids])
        return {**answer, "same": texts == self.texts}

    def adversarial(self, stress: str) -> Answer:
        """Megabytes per second on each text that breaks tokenizers; processor time, best of three."""
        rng = np.random.default_rng(0)
        cases = {"a": "a" * 10_000_000, "space": " " * 10_000_000}
        cases["random latin-1"] = rng.integers(0, 256, 5_000_000, dtype=np.uint8).tobytes().decode("latin-1")
        for path in sorted(Path(stress).iterdir()) if stress else []:
            text = path.read_bytes().decode("utf-8", errors="replace")
            if len(text) > 1000:
                cases[path.name] = text
        speeds = {}
        for name, text in cases.items():
            size = len(text.encode())
            repeat = range(max(1, 1_000_000 // size))
            times = [timed(lambda: [self.coder.encode(text) for _ in repeat])[1]["cpu"] for _ in range(3)]  # noqa: B023
            speeds[name] = size * len(repeat) / min(times) / 1e6
        return {"speeds": speeds}


def main() -> None:
    """Obey orders until there are no more."""
    who, threads, folder, megabytes = sys.argv[1:]
    contestant = Contestant(who, int(threads), Path(folder), float(megabytes))
    for line in sys.stdin:
        order, arguments = json.loads(line)
        print(json.dumps(getattr(contestant, order)(**arguments)), flush=True)


if __name__ == "__main__":
    main()
