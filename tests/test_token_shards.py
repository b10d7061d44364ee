"""Shards of tokens: read as the stream they are, in batches that know no ranks; every fault is named."""

from __future__ import annotations

import hashlib
import json
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from nanochat.common import files
from nanochat.common.checksums import ChecksummedFile
from nanochat.common.errors import UserError
from nanochat.config.model_config import round_up
from nanochat.data import corpus as corpus_module
from nanochat.data import parquet_shards, token_shards
from nanochat.data.corpus import Corpus
from nanochat.data.hub_corpora import HUB_CORPORA
from nanochat.data.text_size import epochs_for
from nanochat.data.train_loader import ValBatches
from nanochat.distributed.world import World
from nanochat.tokenizer.tokenizer import GPT2_PATTERN, Tokenizer
from tests.hub_server import Hub, fetch
from tests.shard_files import read_texts
from tests.test_dataloader import ROWS, Letters, T, digests, global_batch, loaders, rows_of, states
from tests.token_files import NAME, make_corpus, shard_bytes, token_stream


def numbered(count: int, first: int = 0) -> NDArray[np.int64]:
    """Tokens of which no two are the same."""
    return np.arange(first, first + count)


def naive_rows(tokens: list[int], step: int) -> list[list[int]]:
    """All rows of a stream: every one begins where the last target of the one before it stands."""
    rows, start = [], 0
    while start + step + 1 <= len(tokens):
        rows.append(tokens[start : start + step + 1])
        start += step
    return rows


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_shards, "CHUNK_TOKENS", 500)


@pytest.fixture
def corpus(small_blocks: None) -> Corpus:
    """Three shards for training of 24 blocks together, and one for validation."""
    train = [numbered(5100), numbered(3000, 5100), numbered(3490, 8100)]
    return make_corpus(list(train), numbered(4000, 20_000))


# -----------------------------------------------------------------------------
# Reading


@given(count=st.integers(1, 400), step=st.integers(1, 90), block=st.integers(1, 130))
def test_the_rows_of_all_blocks_are_the_stream(
    count: int, step: int, block: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tokens = [(7 * i) % 65536 for i in range(count)]
    path = tmp_path_factory.getbasetemp() / "stream.bin"
    path.write_bytes(shard_bytes(tokens))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_shards, "CHUNK_TOKENS", block)
        source, blocks = ChecksummedFile(path), range(token_shards.chunks(count))
        parts = [token_shards.read_rows(source, i, step + 1, 65536) for i in blocks]
    assert [row for part in parts for row in part.tolist()] == naive_rows(tokens, step)


def test_a_block_of_a_large_shard_is_read_without_the_rest(tmp_path: Path) -> None:
    path, count = tmp_path / "large.bin", 100_000_000
    path.write_bytes(shard_bytes([], count=count))
    with path.open("r+b") as file:
        file.truncate(1024 + 2 * count)  # zeros that take no disk
    source = ChecksummedFile(path)
    tracemalloc.start()
    rows = token_shards.read_rows(source, 50, 2049, 50257)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows.shape == (512, 2049)
    assert peak < 3 * rows.nbytes


FAULTS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "nothing": (lambda _: b"", "0 bytes, fewer than the 1024 of the header"),
    "a short header": (lambda data: data[:1023], "1023 bytes, fewer than the 1024"),
    "another magic": (lambda data: shard_bytes([1, 2], magic=20240801), "begins with 20240801, expected"),
    "parquet": (lambda data: b"PAR1" + data[4:], "begins with 827474256, expected 20240520"),
    "another version": (lambda data: shard_bytes([1, 2], version=2), "version 2 of the format, expected 1"),
    "a short file": (lambda data: data[:-2], "says 1000 tokens, the file holds 999"),
    "an odd byte": (lambda data: data + b"\0", "2001 bytes after the header, an odd number"),
    "half a token less": (lambda data: data[:-1], "1999 bytes after the header, an odd number"),
    "a count too small": (lambda data: data + b"\0\0", "says 1000 tokens, the file holds 1001"),
    "a count too large": (lambda data: shard_bytes([1, 2], count=1 << 30), "says 1073741824 tokens"),
    "a count below 0": (lambda data: shard_bytes([1, 2], count=-2), "says -2 tokens, the file holds 2"),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_file_that_is_no_shard_is_one_error_that_names_it(tmp_path: Path, fault: str) -> None:
    spoil, message = FAULTS[fault]
    path = tmp_path / "fineweb_train_000001.bin"
    path.write_bytes(spoil(shard_bytes(numbered(1000))))
    with pytest.raises(UserError, match=f"{re.escape(str(path))}: not a shard of tokens: .*{message}"):
        parquet_shards.describe(path, "train")


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_shard_of_a_corpus_that_is_spoiled_is_found_before_training(corpus: Corpus, fault: str) -> None:
    path = corpus.path(corpus.val_shards[0])
    path.write_bytes(FAULTS[fault][0](path.read_bytes()))
    with pytest.raises(UserError, match=r"fineweb_val_000000.bin: the shard is damaged.* -n 3"):
        Corpus.open(corpus.name)


def test_a_flipped_bit_in_a_training_shard_stops_the_loader(corpus: Corpus) -> None:
    path = corpus.path(corpus.train_shards[1])
    data = bytearray(path.read_bytes())
    data[3000] ^= 16
    path.write_bytes(data)
    [loader] = loaders(Corpus.open(corpus.name), 1)
    with pytest.raises(UserError, match=r"fineweb_train_000002.bin: the shard is damaged"):
        [loader.next_batch() for _ in range(20)]


def test_a_token_beyond_the_vocabulary_is_named_with_its_place(tmp_path: Path) -> None:
    tokens = numbered(1000)
    tokens[700] = 50257
    path = tmp_path / "x.bin"
    path.write_bytes(shard_bytes(tokens))
    assert len(token_shards.read_rows(ChecksummedFile(path), 0, 33, 50258)) == 31
    with pytest.raises(UserError, match=r"x.bin: token 700 is 50257, .* ids below 50257"):
        token_shards.read_rows(ChecksummedFile(path), 0, 33, 50257)


@given(start=st.binary(max_size=20), size=st.integers(0, 5000))
def test_any_header_gives_its_count_or_a_reason(start: bytes, size: int) -> None:
    header = start.ljust(1024, b"\0")[:size]
    try:
        count = token_shards.count_tokens(header, size)
    except ValueError:
        return
    assert size == 1024 + 2 * count


def test_text_is_not_read_out_of_tokens(corpus: Corpus) -> None:
    with pytest.raises(UserError, match="holds tokens, not text"):
        corpus.read_block(corpus.train_shards[0], 0)


def test_a_corpus_holds_text_or_tokens_and_not_both(corpus: Corpus) -> None:
    path = corpus.folder / "manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    manifest["shards"][0]["name"] = "shard_00000.parquet"
    path.write_text(json.dumps(manifest), "utf-8")
    with pytest.raises(UserError, match="some shards hold text and some tokens"):
        Corpus.open(corpus.name)


def test_the_summary_counts_tokens(corpus: Corpus) -> None:
    assert f"{NAME}: 11590 tokens in 3 training shards" in corpus_module.summary(corpus)
    assert "4000 for validation" in corpus_module.summary(corpus)


# -----------------------------------------------------------------------------
# Batches


def test_batches_do_not_depend_on_ranks_or_micro_batch(corpus: Corpus) -> None:
    expected = digests(loaders(corpus, 1), 70)  # more than two epochs
    assert len(set(expected)) == 70
    for size, micro in [(1, 16), (2, 1), (2, 8), (4, 4), (8, 2)]:
        assert digests(loaders(corpus, size, device_batch_size=micro), 70) == expected, (size, micro)


def test_a_run_that_stops_and_goes_on_at_another_world_size_sees_the_same_batches(corpus: Corpus) -> None:
    expected = digests(loaders(corpus, 1), 40)
    ranks = loaders(corpus, 1)
    seen: list[str] = []
    for size, steps in [(2, 7), (4, 1), (1, 13), (8, 2), (2, 17)]:
        seen += digests(ranks, steps)
        told = states(ranks)
        assert all(state == told[0] for state in told)
        ranks = loaders(corpus, size)
        for loader in ranks:
            loader.load_state_dict(told[0])
    assert seen == expected


def test_an_epoch_has_every_row_of_the_stream_once_and_the_first_comes_shard_by_shard(corpus: Corpus) -> None:
    [loader] = loaders(corpus, 1, streams=1)
    streams = [range(5100), range(5100, 8100), range(8100, 11590)]
    expected = [tuple(row) for stream in streams for row in naive_rows(list(stream), T)]
    drawn = np.concatenate([global_batch([loader]) for _ in range(-(-len(expected) // ROWS))])
    assert sorted(map(tuple, drawn[: len(expected)].tolist())) == expected
    first_of = [next(i for i, s in enumerate(streams) if row[0] in s) for row in drawn[: len(expected)]]
    assert first_of == sorted(first_of)
    assert drawn[: len(expected)].tolist() != [list(row) for row in expected]  # but its blocks are shuffled
    assert loader.epoch > 1


@pytest.mark.parametrize("size", [1, 2, 4])
def test_validation_is_the_stream_from_its_beginning(corpus: Corpus, size: int) -> None:
    tokens, wanted = list(range(20_000, 24_000)), 50 * T
    found: dict[int, list[int]] = {}
    for rank in range(size):
        world = World(rank, size, World.single_process().device, None)
        batches = ValBatches(corpus, Letters(), T, 3, world, max_tokens=wanted)
        for place, row in enumerate(rows_of(list(batches)).tolist()):
            found[place * size + rank] = row
    assert [found[i] for i in range(50)] == naive_rows(tokens[: wanted + 1], T)
    assert len(found) == 50


def test_epochs_are_counted(corpus: Corpus) -> None:
    assert epochs_for(corpus, Letters(), 23_180) == 2.0


def test_a_tokenizer_with_fewer_ids_is_refused(corpus: Corpus) -> None:
    class Few(Letters):
        bos_id = 300

    batches = ValBatches(corpus, Few(), T, 4, World.single_process())
    with pytest.raises(UserError, match=r"fineweb_val_000000.bin: token .* ids below 301"):
        list(batches)


# -----------------------------------------------------------------------------
# GPT-2's tokens


@pytest.fixture(scope="module")
def gpt2(shared_data: Path) -> Tokenizer:
    return Tokenizer.from_gpt2_file(shared_data / "bpe" / "encoder.json")


def test_its_vocab_json_makes_the_tokenizer_that_its_ranks_make(gpt2: Tokenizer, shared_data: Path) -> None:
    ranks = Tokenizer.from_ranks_file(shared_data / "bpe" / "r50k_base.tiktoken", GPT2_PATTERN)
    assert gpt2.fingerprint == ranks.fingerprint
    assert gpt2.bos_id == 50256
    assert round_up(gpt2.vocab_size, 64) == round_up(50257, 64) == 50304
    assert gpt2.encode("Hello world, 2024!") == [15496, 995, 11, 48609, 0]


@pytest.mark.parametrize("text", ['{"a": 0, "b": 1}', "[]", '{"<|endoftext|>": 5}', "not JSON"])
def test_another_file_is_not_gpt2s_vocabulary(tmp_path: Path, text: str) -> None:
    (tmp_path / "vocab.json").write_text(text, "utf-8")
    with pytest.raises(UserError, match=r"vocab.json"):
        Tokenizer.from_gpt2_file(tmp_path / "vocab.json")


def test_real_text_comes_back_from_its_shards(gpt2: Tokenizer, shared_data: Path) -> None:
    texts = read_texts(shared_data / "prose" / "shard_00010.parquet", 0)[:60]
    corpus = make_corpus([token_stream(gpt2, texts)], token_stream(gpt2, texts[:5]))
    rows = corpus.read_rows(corpus.train_shards[0], 0, T + 1, gpt2.bos_id + 1)
    stream = [*rows[:, :-1].flatten().tolist(), int(rows[-1, -1])]
    told = gpt2.decode(stream).split("<|bos|>")
    assert told[0] == ""
    assert told[1:-1] == texts[:-1]
    assert texts[-1].startswith(told[-1].rstrip("\ufffd"))
    assert len(told[-1]) > len(texts[-1]) - 6 * T


# -----------------------------------------------------------------------------
# From the hub


@pytest.fixture
def tokens_hub(small_blocks: None) -> Hub:
    names = [*(f"fineweb_train_{i:06d}.bin" for i in (1, 2)), "fineweb_val_000000.bin"]
    contents = {name: shard_bytes(numbered(3000, 100 * i)) for i, name in enumerate(names)}
    server = Hub(contents, HUB_CORPORA[NAME].repo)
    server.model_files["openai-community/gpt2/vocab.json"] = b'{"a": 0}'
    return server


def test_shards_and_vocabulary_come_from_the_hub(tokens_hub: Hub, base_dir: Path, shared_data: Path) -> None:
    vocabulary = (shared_data / "bpe" / "encoder.json").read_bytes()
    tokens_hub.model_files["openai-community/gpt2/vocab.json"] = vocabulary
    done = fetch(tokens_hub, base_dir, "-n", "2", corpus=NAME)
    assert done.returncode == 0, done.stderr
    folder = base_dir / "data" / NAME
    manifest = files.read_json(folder / "manifest.json")
    assert [(s["name"], s["split"], s["bytes"]) for s in manifest["shards"]] == [
        ("fineweb_train_000001.bin", "train", 7024),
        ("fineweb_train_000002.bin", "train", 7024),
        ("fineweb_val_000000.bin", "val", 7024),
    ]
    for shard in manifest["shards"]:
        assert shard["sha256"] == hashlib.sha256(tokens_hub.contents[shard["name"]]).hexdigest()
        assert (folder / shard["name"]).read_bytes() == tokens_hub.contents[shard["name"]]
    assert Tokenizer.load(files.tokenizer_dir(NAME)).bos_id == 50256
    assert sorted(path.name for path in folder.iterdir()) == [*sorted(tokens_hub.contents), "manifest.json"]
    assert "6000 tokens in 2 training shards" in done.stdout

    tokens_hub.model_files.clear()  # what is there is not fetched again
    assert fetch(tokens_hub, base_dir, "-n", "2", corpus=NAME).returncode == 0
    assert tokens_hub.requests == dict.fromkeys([*tokens_hub.contents, "vocab.json"], 1)


def test_another_vocabulary_is_refused(tokens_hub: Hub, base_dir: Path) -> None:
    done = fetch(tokens_hub, base_dir, "-n", "1", corpus=NAME)
    assert done.returncode == 2
    assert "openai-community/gpt2: 1 missing: vocab.json (it has sha256" in done.stderr
    assert not files.tokenizer_dir(NAME).exists()


def test_a_file_at_the_hub_that_is_no_shard_is_named_before_it_is_fetched(
    tokens_hub: Hub, base_dir: Path
) -> None:
    name = "fineweb_train_000002.bin"
    for data in (shard_bytes([1, 2, 3], version=2), shard_bytes([1, 2, 3])[:-1], b"<html>"):
        tokens_hub.contents[name] = data
        done = fetch(tokens_hub, base_dir, "-n", "2", corpus=NAME)
        assert done.returncode == 2
        assert f"1 missing: {name} (" in done.stderr
        assert done.stderr.count("\n") == 1
    assert not tokens_hub.requests
