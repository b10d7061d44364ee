"""The loader: one sequence of global batches, whatever the ranks, micro-batch, threads and stops."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from nanochat.common import files
from nanochat.common.errors import UserError
from nanochat.data import parquet_shards, train_loader
from nanochat.data.corpus import Corpus
from nanochat.data.packing import pack, shuffled
from nanochat.data.row_stream import fit_streams
from nanochat.data.text_size import epochs_for
from nanochat.data.train_loader import Batch, TrainLoader, ValBatches
from nanochat.distributed.world import World
from tests.conftest import REPO
from tests.shard_files import read_texts

ROWS = 16  # of a global batch
T = 24


class Letters:
    """Characters as ids: a tokenizer whose every token can be traced to its text."""

    bos_id = 0x110000
    fingerprint = "letters"

    def encode_batch(
        self, texts: list[str], num_threads: int | None = None
    ) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        ids = np.array([ord(letter) for text in texts for letter in text], np.uint32)
        return ids, np.concatenate([[0], np.cumsum([len(text) for text in texts])]).astype(np.int64)


def document(split: str, number: int) -> str:
    """Letters that occur in no other document."""
    first = 0x10000 + number * 64 + (0x80000 if split == "val" else 0)
    return "".join(chr(first + i) for i in range(5 + number * 7 % 50))


def make(
    monkeypatch: pytest.MonkeyPatch, documents: int = 300, per_group: int = 25, name: str = "c"
) -> Corpus:
    """A corpus with row groups of `per_group` documents in three training shards."""
    monkeypatch.setattr(parquet_shards, "GROUP_DOCUMENTS", per_group)
    monkeypatch.setattr(parquet_shards, "SHARD_CHARS", documents * 10)
    folder = files.data_dir(name)
    folder.mkdir(parents=True)
    members = parquet_shards.write_shards(
        (document("train", i) for i in range(documents)), folder, "train", 0
    )
    members += parquet_shards.write_shards(
        (document("val", i) for i in range(60)), folder, "val", len(members)
    )
    Corpus(folder, name, "local files", members).write_manifest(folder)
    return Corpus.open(name)


class Ranks:
    """All ranks of a world in one process: the collective adds what the ranks bring, in threads that meet."""

    def __init__(self, size: int) -> None:
        self.meeting = threading.Barrier(size)
        self.total: torch.Tensor | None = None
        self.worlds = [self.world(rank, size) for rank in range(size)]

    def world(self, rank: int, size: int) -> World:
        ranks = self

        class Together(World):
            def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
                if ranks.meeting.wait() == 0:
                    ranks.total = torch.zeros_like(tensor)
                ranks.meeting.wait()
                for turn in range(size):
                    if turn == rank:
                        assert ranks.total is not None
                        ranks.total += tensor
                    ranks.meeting.wait()
                assert ranks.total is not None
                return tensor.copy_(ranks.total)

        return Together(rank, size, torch.device("cpu"), "threads" if size > 1 else None)


def loaders(corpus: Corpus, size: int, **changes: Any) -> list[TrainLoader]:
    """The loader of each rank of a world."""
    options: dict[str, Any] = {
        "sequence_len": T,
        "rows_per_batch": ROWS,
        "streams": 4,
        "seed": 3,
        "device_batch_size": 2,
        **changes,
    }
    return [TrainLoader(corpus, Letters(), world=world, **options) for world in Ranks(size).worlds]


def rows_of(batches: list[Batch]) -> NDArray[np.int64]:
    """The (n, T + 1) rows of some micro-batches."""
    return torch.cat([torch.cat([inputs, targets[:, -1:]], 1) for inputs, targets, *_ in batches]).numpy()


def global_batch(ranks: list[TrainLoader]) -> NDArray[np.int64]:
    """Rows of the next global batch in their order: row i is on rank i mod W."""
    mine = [rows_of(loader.next_batch()) for loader in ranks]
    return np.stack([mine[i % len(ranks)][i // len(ranks)] for i in range(ROWS)])


def digests(ranks: list[TrainLoader], count: int) -> list[str]:
    return [hashlib.sha256(global_batch(ranks).tobytes()).hexdigest() for _ in range(count)]


def states(ranks: list[TrainLoader]) -> list[dict[str, Any]]:
    """What state_dict, a collective, gives on each rank; through JSON, as a checkpoint does."""
    with ThreadPoolExecutor(len(ranks)) as pool:
        return [json.loads(json.dumps(s)) for s in pool.map(lambda loader: loader.state_dict(), ranks)]


@pytest.mark.parametrize("keep_tails", [False, True])
def test_global_batches_do_not_depend_on_ranks_micro_batch_or_threads(
    monkeypatch: pytest.MonkeyPatch, keep_tails: bool
) -> None:
    corpus = make(monkeypatch)
    expected = digests(loaders(corpus, 1, keep_tails=keep_tails), 60)
    assert len(set(expected)) == 60
    for size, micro, threads in [(1, 16, 1), (2, 1, 2), (2, 8, 3), (4, 4, 1), (8, 2, 2), (16, 1, 1)]:
        ranks = loaders(corpus, size, device_batch_size=micro, threads=threads, keep_tails=keep_tails)
        assert digests(ranks, 60) == expected, (size, micro, threads)


def test_a_run_that_stops_and_goes_on_at_another_world_size_sees_the_same_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    corpus = make(monkeypatch)
    expected = digests(loaders(corpus, 1), 60)
    ranks = loaders(corpus, 1)
    seen: list[str] = []
    for size, steps in [(2, 7), (4, 1), (1, 13), (8, 22), (2, 17)]:
        seen += digests(ranks, steps)
        told = states(ranks)
        assert all(state == told[0] for state in told)
        ranks = loaders(corpus, size)
        for loader in ranks:
            loader.load_state_dict(told[0])
    assert seen == expected


@pytest.mark.slow
def test_two_ranks_on_gloo_go_on_where_one_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = make(monkeypatch)
    [loader] = loaders(corpus, 1)
    expected = digests([loader], 20)
    [stopped] = loaders(corpus, 1)
    digests([stopped], 7)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments = ["tests/dist/loader_script.py", corpus.name, "13", json.dumps(stopped.state_dict())]
    done = subprocess.run(
        [*command, *arguments],
        cwd=REPO,
        env={**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["digests"] == expected[7:]
    assert told["state"] == loader.state_dict()


def test_the_state_is_that_of_the_batch_not_yet_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = make(monkeypatch)
    [loader] = loaders(corpus, 1)
    assert loader.state_dict()["cursors"] == [[0, 0, 0]] * 4
    loader.next_batch()
    assert loader.state_dict()["cursors"] == [[0, 0, 4]] * 4
    before = loader.state_dict()
    wanted = rows_of(loader.next_batch())
    [again] = loaders(corpus, 1)
    again.load_state_dict(before)
    assert (rows_of(again.next_batch()) == wanted).all()


def test_a_rank_reads_only_its_streams_where_ranks_divide_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = make(monkeypatch)
    seen: list[set[str]] = []
    for loader in loaders(corpus, 4):
        read: set[str] = set()
        original = Corpus.read_block

        def spy(
            self: Corpus,
            shard: parquet_shards.Shard,
            group: int,
            read: set[str] = read,
            original: Any = original,
        ) -> Any:
            read.add(f"{shard.name} {group}")
            return original(self, shard, group)

        with monkeypatch.context() as patch:
            patch.setattr(Corpus, "read_block", spy)
            for _ in range(3):
                loader.next_batch()
            loader._pool.shutdown()
        seen.append(read)
    assert all(seen)
    assert sum(map(len, seen)) == len(set().union(*seen))


def test_every_row_is_full_and_made_of_whole_spans_of_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = make(monkeypatch)
    [loader] = loaders(corpus, 1)
    texts = [document("train", i) for i in range(300)]
    for _ in range(20):
        for inputs, targets, _ in loader.next_batch():
            assert inputs.shape == targets.shape == (2, T)
            assert inputs.dtype == targets.dtype == torch.int64
            assert (inputs[:, 0] == Letters.bos_id).all()
            assert (inputs[:, 1:] == targets[:, :-1]).all()
            for row in rows_of([(inputs, targets)]):
                for span in "".join(chr(t) if t < 0x110000 else "\n" for t in row).split("\n"):
                    assert any(span in text for text in texts)


def test_an_epoch_has_every_token_and_the_next_has_the_same_rows_in_another_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    [loader] = loaders(
        make(monkeypatch), 1, streams=1, rows_per_batch=1, device_batch_size=1, keep_tails=True
    )
    epochs: dict[int, list[tuple[int, ...]]] = {0: [], 1: [], 2: []}
    while loader.epoch < 2:
        row = tuple(rows_of(loader.next_batch())[0].tolist())
        [[epoch, _, _]] = loader.state_dict()["cursors"]
        epochs[epoch].append(row)
    text = "".join(document("train", i) for i in range(300))
    tokens = [token for row in epochs[0] for token in row if token != Letters.bos_id]
    assert set(tokens) == set(map(ord, text))
    assert len(tokens) < len(text) + 12 * (T + 1)  # the last row of each of the 12 blocks may repeat tokens
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1])


def test_the_seed_decides_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = make(monkeypatch)
    assert digests(loaders(corpus, 1, seed=1), 3) != digests(loaders(corpus, 1, seed=2), 3)
    assert digests(loaders(corpus, 1, seed=1), 3) == digests(loaders(corpus, 1, seed=1), 3)


def test_the_order_is_the_one_that_earlier_runs_used(monkeypatch: pytest.MonkeyPatch) -> None:
    [digest] = digests(loaders(make(monkeypatch), 1), 1)
    assert digest == "1ed5aa72909b7488588c293c78d844618ab6601dbe430e1c7cdb8f74becf8461"


def test_fewer_row_groups_than_streams_lower_the_streams_with_a_notice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = make(monkeypatch, documents=60, per_group=25)
    ranks = loaders(corpus, 8, streams=8)
    assert ranks[0].n_streams == 2
    assert capsys.readouterr().out.count("c has 3 row groups: 2 streams, not 8") == 1
    assert digests(ranks, 20) == digests(loaders(corpus, 1, streams=8), 20)


def test_fit_streams_divides_the_rows() -> None:
    assert [
        fit_streams(8, rows, blocks) for rows, blocks in [(32, 100), (32, 3), (12, 100), (7, 100), (1, 1)]
    ] == [
        8,
        2,
        6,
        7,
        1,
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"cursors": [[0, 0, 0]]},
        {"cursors": [[0, 0, 0]] * 8},
        {"cursors": [[0, 0]] * 4},
        {"cursors": [[0, 99, 0]] * 4},
        {"cursors": [[0, 0, 1 << 63]] * 4},
        {"cursors": None},
        {"cursors": [[-1, 0, 0]] * 4},
    ],
)
def test_a_damaged_state_is_refused(monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]) -> None:
    [loader] = loaders(make(monkeypatch), 1)
    state = loader.state_dict()
    with pytest.raises(UserError, match=next(iter(change)).removesuffix("s")):
        loader.load_state_dict({**state, **change})


def test_a_corpus_with_too_little_text_is_an_error_and_not_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = make(monkeypatch, documents=3)
    with pytest.raises(UserError, match="too little text to fill a row"):
        loaders(corpus, 1, sequence_len=500)[0].next_batch()
    assert global_batch(loaders(corpus, 1, sequence_len=500, keep_tails=True)).shape == (ROWS, 501)


def test_a_shard_that_vanishes_midway_is_named_and_the_state_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = make(monkeypatch)
    [loader] = loaders(corpus, 1)
    loader.next_batch()
    for shard in corpus.train_shards:
        corpus.path(shard).unlink()
    before = loader.state_dict()
    with pytest.raises(UserError, match=r"shard_0000\d\.parquet: .*Repair: "):
        for _ in range(100):
            before = loader.state_dict()
            loader.next_batch()
    assert loader.state_dict() == before


def test_validation_holds_every_token_once_for_any_ranks_and_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = make(monkeypatch)
    letters = sorted(ord(letter) for i in range(60) for letter in document("val", i))
    expected: list[list[int]] = []
    for size, rows in [(1, 8), (1, 1), (2, 3), (4, 5), (64, 2)]:
        parts = [list(ValBatches(corpus, Letters(), T, rows, world)) for world in Ranks(size).worlds]
        targets = [row.tolist() for batches in parts for _, batch in batches for row in batch]
        spelled = sorted(t for row in targets for t in row if 0 <= t < Letters.bos_id)
        assert spelled == letters
        expected = expected or sorted(targets)
        assert sorted(targets) == expected
        assert all(len(inputs) <= rows for batches in parts for inputs, _ in batches)
        assert all((inputs[:, 0] == Letters.bos_id).all() for batches in parts for inputs, _ in batches)
        assert all((inputs >= 0).all() for batches in parts for inputs, _ in batches)


def test_validation_without_tails_has_the_rows_that_training_would_make(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    corpus = make(monkeypatch)
    whole = ValBatches(corpus, Letters(), T, 8, World.single_process(), keep_tails=False)
    rows = {
        (inputs[0].item(), *targets.tolist()) for x, y in whole for inputs, targets in zip(x, y, strict=True)
    }
    shard = corpus.val_shards[0]
    expected: set[tuple[int, ...]] = set()
    for group in range(shard.row_groups):
        ids, offsets = Letters().encode_batch(corpus.read_block(shard, group))
        packed = pack(ids, offsets, bos_id=Letters.bos_id, row_slots=T + 1, keep_tails=False)
        expected |= {tuple(row) for row in packed.rows.tolist()}
    assert rows == expected


def test_validation_of_so_many_tokens_is_a_part_of_the_whole_and_repeats(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    corpus = make(monkeypatch)
    for size in (1, 2, 4):
        batches = [ValBatches(corpus, Letters(), T, 4, w, max_tokens=10 * T - 1) for w in Ranks(size).worlds]
        first = [row.tolist() for part in batches for _, targets in part for row in targets]
        again = [row.tolist() for part in batches for _, targets in part for row in targets]
        assert len(first) == 10
        assert first == again
    whole = [
        row.tolist()
        for _, targets in ValBatches(corpus, Letters(), T, 4, World.single_process())
        for row in targets
    ]
    assert all(row in whole for row in first)


def test_epochs_are_estimated_from_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = make(monkeypatch)
    tokens = sum(1 + len(document("train", i)) for i in range(300))
    assert epochs_for(corpus, Letters(), 2 * tokens) == pytest.approx(2, rel=0.1)


def test_prose_crops_under_18_percent(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    gpt2 = tokenizers.Tokenizer.from_file(str(shared_data / "bpe" / "gpt2_tokenizer.json"))
    texts = read_texts(shared_data / "prose" / "shard_00000.parquet", 0)
    lengths = [len(encoding.ids) for encoding in gpt2.encode_batch_fast(texts, add_special_tokens=False)]
    from nanochat.data.packing import pack

    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = np.zeros(offsets[-1], np.uint32)
    packed = pack(ids, offsets, bos_id=1, row_slots=2049, keep_tails=False)
    assert 0.1 < 1 - (packed.rows == 0).sum() / len(ids) < 0.18


def test_shards_that_arrive_one_by_one_are_read_so_in_the_first_epoch_only() -> None:
    shard_of = np.repeat(np.arange(5), [3, 1, 4, 2, 6])
    first, second = (train_loader.group_order(shard_of, 7, epoch, in_order=True) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(16))
    assert (np.diff(shard_of[first]) >= 0).all()
    assert (np.diff(shard_of[second]) < 0).any()
    assert (first != np.arange(16)).any()
    assert (first != train_loader.group_order(shard_of, 8, 0, in_order=True)).any()
    assert (first[:3] < 3).all()
    assert (train_loader.group_order(shard_of, 7, 0, in_order=False) == shuffled(16, 7, 0)).all()
