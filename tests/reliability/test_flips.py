"""P5 while training: what changes in a shard after its first hash is refused before it is in a batch."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from dev.fault_box import Box
from dev.fault_rows.integrity import expect_stopped, foreign, started
from nanochat.common import checksums
from nanochat.common.errors import UserError
from nanochat.data import token_shards
from nanochat.data.corpus import Corpus
from nanochat.data.train_loader import TrainLoader
from nanochat.distributed.world import World
from tests.reliability.figures import Figure
from tests.shard_files import KINDS, bits_of, flip, foreign_corpus


class Bytes:
    """A tokenizer whose ids are the bytes of the text."""

    bos_id = 256
    fingerprint = "bytes"

    def encode_batch(
        self, texts: list[str], num_threads: int | None = None
    ) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        encoded = [text.encode() for text in texts]
        ids = np.frombuffer(b"".join(encoded), np.uint8).astype(np.uint32)
        return ids, np.cumsum([0, *map(len, encoded)])


class Trainer:
    """The data of a trainer that is in its second epoch: every shard has been hashed and read before."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus, [shard] = corpus, corpus.train_shards
        self.path = corpus.path(shard)
        self.loader = TrainLoader(
            corpus,
            Bytes(),
            sequence_len=255,
            rows_per_batch=64,
            streams=1,
            seed=0,
            world=World.single_process(),
            device_batch_size=64,
            threads=1,
        )
        while self.loader.epoch < 1:
            self.loader.next_batch()
        self.state = self.loader.state_dict()
        self.right = self.epoch()

    def epoch(self) -> str:
        """Digest of the batches of the epoch that begins at the state."""
        self.loader.load_state_dict(self.state)
        digest, end = hashlib.sha256(), self.loader.epoch + 1
        while self.loader.epoch < end:
            for inputs, *_ in self.loader.next_batch():
                digest.update(inputs.numpy().tobytes())
        return digest.hexdigest()


@pytest.fixture(params=KINDS)
def trainer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trainer]:
    """A trainer on a corpus of each kind, of several blocks."""
    monkeypatch.setattr(token_shards, "CHUNK_TOKENS", 100_000)
    made = Trainer(foreign_corpus(request.param))
    yield made
    made.loader.close()


def try_flips(trainer: Trainer, figure: Figure, count: int) -> None:
    """Flip bits one after another; each stops the trainer with the shard's name and what repairs it."""
    for bit in bits_of(trainer.path, count, seed=count):
        flip(trainer.path, bit)
        with figure.trial(f"{trainer.path.name}, bit {bit}"):
            with pytest.raises(UserError) as refused:
                trainer.epoch()
            assert str(trainer.path) in str(refused.value)
            assert "have changed since the file was hashed" in str(refused.value)
            assert "Repair: python -m scripts.dataset" in str(refused.value)
        flip(trainer.path, bit)
    assert trainer.epoch() == trainer.right  # and with the byte put back it goes on


UNIT = "bits flipped in {} while a loader reads it again"


def test_a_bit_flipped_between_two_reads_is_refused(
    trainer: Trainer, figure: Callable[..., Figure], request: pytest.FixtureRequest
) -> None:
    try_flips(trainer, figure("P5", UNIT.format(trainer.path.suffix) + f", {request.node.callspec.id}"), 40)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_thousand_bits_flipped_between_two_reads_are_refused(
    trainer: Trainer, figure: Callable[..., Figure], request: pytest.FixtureRequest
) -> None:
    try_flips(trainer, figure("P5", UNIT.format(request.node.callspec.id)), 2000)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_ten_real_runs_end_with_the_name_of_the_shard(
    tmp_path: Path, kind: str, figure: Callable[..., Figure]
) -> None:
    """The command itself, which has read every block before and comes to it again in a later epoch."""
    trials = figure("P5", f"runs of base_train whose shard changes by a bit, {kind}")
    box = Box(tmp_path / "box")
    foreign(box, kind)
    try:
        for number in range(10):
            _, path = started(box, number, f"run-{number}")
            [bit] = bits_of(path, 1, seed=number)
            flip(path, bit)
            with trials.trial(f"bit {bit}"):
                expect_stopped(
                    box, number, path.name, "have changed since", "Repair: python -m scripts.dataset"
                )
            flip(path, bit)
    finally:
        box.close()


def test_planted_without_checksums_flips_give_other_batches(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The harness sees what it must see: these files have no guard of their own."""

    monkeypatch.setattr(checksums, "_checksums", lambda data: [])
    silent = 0
    for bit in bits_of(trainer.path, 40, seed=1):
        flip(trainer.path, bit)
        with contextlib.suppress(UserError):
            silent += trainer.epoch() != trainer.right
        flip(trainer.path, bit)
    assert silent > 5


def test_another_shard_under_the_name_is_refused(trainer: Trainer, figure: Callable[..., Figure]) -> None:
    """Of the same size, and whole in itself: only its bytes are others."""
    swapped = figure("P5", "shards swapped for others of their size and format", independent=False)
    good = trainer.path.read_bytes()
    other = trainer.path.with_name("other")
    block = slice(70_000, 70_000 + 9_000)
    changes = [
        good[::-1],
        b"\0" * len(good),
        good[: block.start] + good[block][::-1] + good[block.stop :],
    ]
    for number, data in enumerate(changes):
        assert len(data) == len(good)
        other.write_bytes(data)
        other.replace(trainer.path)
        with swapped.trial(number), pytest.raises(UserError, match="have changed since.* Repair: "):
            trainer.epoch()
    trainer.path.write_bytes(good)
    assert trainer.epoch() == trainer.right
