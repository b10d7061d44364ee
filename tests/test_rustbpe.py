"""rustbpe against tiktoken, the `regex` module and a trainer that counts everything anew."""

from __future__ import annotations

import argparse
import base64
import collections
import itertools
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import regex
import tiktoken

import rustbpe
from nanochat.tokenizer.tokenizer import PATTERN
from tests.conftest import REPO

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"
    r"|\s*[\r\n]|\s+(?!\S)|\s"
)
BY_HAND = [PATTERN, PATTERN.replace("{1,2}", "{1,3}"), GPT2, CL100K]
BY_REGEX = r"\w+|[^\w\s]+|\s+"

# Letters of several scripts, digits, marks, every kind of white space, what the patterns name, controls.
ODD = (
    "aZs\u017fl'\u00e9\u0416\u4e2d\u0e01\u0301\u200d09\u00b2\u0663\u2167.,<|>_\x00\ufffd\U0001f600"
    " \t\n\r\x0b\x0c\x1c\x85\u00a0\u2003\u2028\u3000"
)
any_character = st.characters(exclude_categories=["Cs", "Cn"])
odd_text = st.text(st.one_of(st.sampled_from(ODD), any_character), max_size=60)


def byte_ranks() -> dict[bytes, int]:
    return {bytes([byte]): byte for byte in range(256)}


def as_tiktoken(tokenizer: rustbpe.Tokenizer) -> tiktoken.Encoding:
    ranks = dict(tokenizer.get_mergeable_ranks())
    return tiktoken.Encoding(
        "ours", pat_str=tokenizer.get_pattern(), mergeable_ranks=ranks, special_tokens={}
    )


def train(
    texts: list[str], vocab_size: int, pattern: str = PATTERN, threads: int | None = None
) -> rustbpe.Tokenizer:
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(texts), vocab_size, pattern=pattern, num_threads=threads)
    return tokenizer


def naive_merges(texts: list[str], merges: int) -> list[tuple[int, int]]:
    """BPE by its definition: count all pairs, merge the most frequent (ties: the smaller), again."""
    counts = collections.Counter(piece for text in texts for piece in regex.findall(PATTERN, text))
    words = [(list(piece.encode()), count) for piece, count in counts.items()]
    done: list[tuple[int, int]] = []
    while len(done) < merges:
        pairs: collections.Counter[tuple[int, int]] = collections.Counter()
        for word, count in words:
            for pair in zip(word, word[1:], strict=False):
                pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        for word, _ in words:
            i = 0
            while i + 1 < len(word):
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [256 + len(done)]
                i += 1
        done.append(best)
    return done


@pytest.fixture(scope="module")
def source() -> list[str]:
    """A quarter of a megabyte of Python's own sources, by lines."""
    folder = Path(argparse.__file__).parent
    names = ("argparse.py", "typing.py", "inspect.py")
    return "".join((folder / name).read_text("utf-8") for name in names).splitlines(keepends=True)


@pytest.fixture(scope="module")
def trained(source: list[str]) -> rustbpe.Tokenizer:
    return train([*source, ODD, "na\u00efve \u4f60\u597d " * 9], 2000)


@pytest.mark.parametrize("pattern", BY_HAND)
@hypothesis.given(odd_text)
@hypothesis.settings(max_examples=300, deadline=None)
def test_the_splitter_equals_the_regex_module(pattern: str, text: str) -> None:
    ours = rustbpe.Tokenizer.from_ranks(byte_ranks(), pattern).split(text)
    assert ours == regex.findall(pattern, text)


@hypothesis.given(odd_text)
@hypothesis.settings(max_examples=300, deadline=None)
def test_any_text_comes_back_and_has_the_ids_of_tiktoken(trained: rustbpe.Tokenizer, text: str) -> None:
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert trained.decode_bytes(ids) == text.encode()
    assert ids == as_tiktoken(trained).encode_ordinary(text)


@hypothesis.given(
    st.permutations(["ab", "abc", "bc", "aa", "aaa", "ca", "abab", "bb", "cc"]), st.text("abc ", max_size=150)
)
@hypothesis.settings(max_examples=200, deadline=None)
def test_ranks_in_any_order_give_the_ids_of_tiktoken(words: list[str], text: str) -> None:
    ranks = byte_ranks() | {word.encode(): 256 + i for i, word in enumerate(words)}
    ours = rustbpe.Tokenizer.from_ranks(ranks, PATTERN)
    assert ours.encode(text) == as_tiktoken(ours).encode_ordinary(text)


@pytest.mark.parametrize("length", [2, 3, 14, 15, 16, 17, 64, 65, 300])
def test_a_token_that_merging_does_not_reach_is_found_with_any_cache(length: int) -> None:
    ours = rustbpe.Tokenizer.from_ranks(byte_ranks() | {b"a" * length: 256}, PATTERN)
    theirs = as_tiktoken(ours)
    for _ in range(3):
        for text in ("a" * length, "a" * (length + 1), " " + "a" * length, "b" + "a" * length, "b", "aa"):
            assert ours.encode(text) == theirs.encode_ordinary(text), text
    assert ours.encode("a" * length) == [256]


def test_merges_equal_those_of_counting_anew(source: list[str]) -> None:
    text = "".join(source)[:200_000].splitlines(keepends=True)
    assert train(text, 256 + 120).get_merges() == naive_merges(text, 120)


@pytest.mark.slow
def test_merges_equal_those_of_counting_anew_on_a_megabyte(shared_data: Path) -> None:
    texts = prose(shared_data, "shard_00000.parquet", 1_000_000)
    assert train(texts, 256 + 400).get_merges() == naive_merges(texts, 400)


def test_the_vocabulary_does_not_depend_on_threads_or_order(source: list[str]) -> None:
    one = train(source, 1500, threads=1).get_mergeable_ranks()
    for threads in (2, 8):
        assert train(source, 1500, threads=threads).get_mergeable_ranks() == one
    assert train(source[::-1], 1500).get_mergeable_ranks() == one


def test_training_is_a_drop_in_for_the_package_of_the_same_name() -> None:
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(["hello hello world"] * 10, 260)
    assert tokenizer.get_mergeable_ranks()[256:] == [
        (b"el", 256),
        (b"hel", 257),
        (b"lo", 258),
        (b"hello", 259),
    ]
    assert (tokenizer.vocab_size, tokenizer.encode("hello")) == (260, [259])
    assert tokenizer.batch_encode(["hello", "", "a"]) == [[259], [], [97]]
    assert r"\p{N}{1,3}" in tokenizer.get_pattern()


def test_training_reads_columns_of_arrow(source: list[str]) -> None:
    texts: list[str | None] = [*source, "na\u00efve \u4f60\u597d", ""]
    whole = train(source + ["na\u00efve \u4f60\u597d"], 600).get_merges()
    half = len(texts) // 2
    for columns in (
        [pa.array(texts)],
        [pa.array([*texts, None], pa.large_string())],
        [pa.chunked_array([texts[:half], [], texts[half:]])],
        [pa.array(["not this", *texts, "nor this"]).slice(1, len(texts))],
        [pa.array(texts[:half]), pa.array([], pa.string()), *texts[half:]],
    ):
        tokenizer = rustbpe.Tokenizer()
        report = tokenizer.train_from_iterator(columns, 600, buffer_size=100)
        assert tokenizer.get_merges() == whole
        assert report["texts"] == len(texts)
        assert report["bytes"] == sum(len(text.encode()) for text in texts if text)


def test_arrow_offsets_that_lie_are_refused() -> None:
    good = pa.array(["caf\u00e9", "x"])
    for offsets in ([0, 4, 5], [0, 9, 3], [0, 2, 1]):
        buffers = [None, pa.py_buffer(np.array(offsets, dtype=np.int32)), good.buffers()[2]]
        column = pa.StringArray.from_buffers(2, buffers[1], buffers[2])
        with pytest.raises((ValueError, pa.ArrowException)):
            rustbpe.Tokenizer().train_from_iterator([column], 300)


def test_training_reports_what_it_read(source: list[str]) -> None:
    report = rustbpe.Tokenizer().train_from_iterator(source, 300, pattern=PATTERN)
    pieces = collections.Counter(piece for line in source for piece in regex.findall(PATTERN, line))
    assert report == {
        "texts": len(source),
        "bytes": sum(len(line.encode()) for line in source),
        "pieces": pieces.total(),
        "distinct_pieces": sum(len(piece.encode()) > 1 for piece in pieces),
        "prunings": 0,
        "pruned_pieces": 0,
        "pruned_occurrences": 0,
    }


def test_a_bound_on_memory_drops_rare_pieces_alike_for_any_number_of_threads(source: list[str]) -> None:
    # Of each word of ten letters there is one; the sources come again and again.
    letters = np.random.default_rng(0).integers(97, 123, (300_000, 10), dtype=np.uint8)
    words = [row.tobytes().decode() for row in letters]
    texts = [text for i in range(10) for text in (*source, " ".join(words[i * 30_000 : (i + 1) * 30_000]))]
    results = []
    for threads in (1, 2, 8):
        tokenizer = rustbpe.Tokenizer()
        report = tokenizer.train_from_iterator(texts, 1000, num_threads=threads, max_memory=64 << 20)
        results.append((tokenizer.get_merges(), report))
    assert results[0] == results[1] == results[2]
    assert results[0][1]["prunings"] > 0
    assert results[0][1]["pruned_occurrences"] >= results[0][1]["pruned_pieces"] > 100_000
    assert {b" self", b" return", b" def"} <= {token for token, _ in tokenizer.get_mergeable_ranks()}


def test_progress_is_told_and_may_stop_the_training(source: list[str]) -> None:
    told: list[tuple[int, int, int]] = []
    texts = source * 20
    tokenizer = rustbpe.Tokenizer()
    report = tokenizer.train_from_iterator(texts, 400, progress=lambda *now: told.append(now))
    assert told == sorted(told)
    assert told[-1] == (report["bytes"], report["pieces"], 144)

    def stop(read: int, counted: int, merged: int) -> None:
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        rustbpe.Tokenizer().train_from_iterator(texts, 400, progress=stop)


def test_training_stops_where_no_pair_is_left() -> None:
    assert train(["ab"], 1000).get_mergeable_ranks()[256:] == [(b"ab", 256)]
    assert train([], 1000).vocab_size == 256
    assert train(["", "a"], 1000).vocab_size == 256


def test_a_pattern_of_the_users_own_runs_on_the_regex_engine(source: list[str]) -> None:
    tokenizer = train(source, 600, pattern=BY_REGEX)
    text = "".join(source[:300])
    assert tokenizer.split(text) == regex.findall(BY_REGEX, text)
    assert tokenizer.encode(text) == as_tiktoken(tokenizer).encode_ordinary(text)


@pytest.mark.parametrize("threads", [1, 2, 8, None])
def test_batches_are_the_single_texts_end_to_end(
    trained: rustbpe.Tokenizer, source: list[str], threads: int | None
) -> None:
    texts = [*source, "", "x" * 3000]
    ids, offsets = trained.encode_batch_numpy(texts, num_threads=threads)
    assert (ids.dtype, offsets.dtype, offsets[0], len(offsets)) == (np.uint32, np.int64, 0, len(texts) + 1)
    assert [part.tolist() for part in np.split(ids, offsets[1:-1])] == [
        trained.encode(text) for text in texts
    ]
    assert trained.batch_encode(texts[:50]) == [trained.encode(text) for text in texts[:50]]
    assert trained.encode_numpy(texts[0]).tolist() == trained.encode(texts[0])


def test_python_threads_share_a_tokenizer(trained: rustbpe.Tokenizer, source: list[str]) -> None:
    expected = trained.encode_batch_numpy(source, num_threads=1)[0]
    results: list[np.ndarray] = []
    threads = [
        threading.Thread(target=lambda: results.append(trained.encode_batch_numpy(source)[0]))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6
    assert all(np.array_equal(result, expected) for result in results)


@pytest.mark.parametrize("run", ["a", " ", "\n", "ab", "\u4e2d", "\U0001f600", "^", "0", "\u0301"])
def test_long_runs_end_and_come_back(trained: rustbpe.Tokenizer, run: str) -> None:
    text = run * 1_000_000
    ids = trained.encode_numpy(text)
    assert trained.decode_bytes(ids) == text.encode()
    assert trained.encode(run * 20_001) == as_tiktoken(trained).encode_ordinary(run * 20_001)


@pytest.mark.parametrize(("name", "pattern"), [("r50k_base", GPT2), ("cl100k_base", CL100K)])
def test_published_ranks_give_the_ids_of_tiktoken(shared_data: Path, name: str, pattern: str) -> None:
    lines = (shared_data / "bpe" / f"{name}.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    ours = rustbpe.Tokenizer.from_ranks(ranks, pattern)
    theirs = as_tiktoken(ours)
    for text in [*stress(shared_data), *prose(shared_data, "shard_00010.parquet", 500_000)]:
        assert ours.encode(text) == theirs.encode_ordinary(text)


def test_stress_texts_have_the_ids_of_tiktoken(shared_data: Path, trained: rustbpe.Tokenizer) -> None:
    theirs = as_tiktoken(trained)
    for text in stress(shared_data):
        ids = trained.encode(text)
        assert ids == theirs.encode_ordinary(text)
        assert trained.decode(ids) == text


@pytest.mark.slow
def test_prose_has_the_ids_of_tiktoken(shared_data: Path) -> None:
    texts = prose(shared_data, "shard_00000.parquet", 22_000_000)
    ours = train(texts, 32768)
    ids, offsets = ours.encode_batch_numpy(texts)
    theirs = as_tiktoken(ours).encode_ordinary_batch(texts, num_threads=2)
    assert offsets.tolist() == [0, *np.cumsum([len(part) for part in theirs])]
    assert np.array_equal(ids, np.concatenate([np.array(part, dtype=np.uint32) for part in theirs]))


@pytest.mark.slow
def test_memory_is_flat_over_a_thousand_encodes(trained: rustbpe.Tokenizer, source: list[str]) -> None:
    texts = ["".join(source[i:] + source[:i]) * 4 for i in range(10)]

    def resident_pages() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])

    for text in texts * 10:
        trained.encode_numpy(text)
    before = resident_pages()
    for text in texts * 100:
        trained.encode_numpy(text)
    assert resident_pages() < before * 1.05


@hypothesis.given(st.binary(max_size=40))
def test_decoding_replaces_what_is_not_utf8_as_python_does(data: bytes) -> None:
    tokenizer = rustbpe.Tokenizer()
    assert tokenizer.decode(list(data)) == data.decode("utf-8", errors="replace")
    assert tokenizer.decode_bytes(np.frombuffer(data, dtype=np.uint8).astype(np.uint32)) == data


class Lying(str):
    """A `str` that says of itself that it is ASCII, whatever it holds."""

    def isascii(self) -> bool:
        return True

    def encode(self, *how: str) -> bytes:
        return b"something else"


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "vocab_size=255", lambda t: t.train_from_iterator(["a"], 255)),
        (ValueError, "vocab_size=-1", lambda t: t.train_from_iterator(["a"], -1)),
        (ValueError, "buffer_size=0", lambda t: t.train_from_iterator(["a"], 300, buffer_size=0)),
        (ValueError, "num_threads=0", lambda t: t.encode_batch_numpy(["a"], num_threads=0)),
        (
            ValueError,
            r"num_threads=1180591620717411303424: .* 2\*\*63",
            lambda t: t.batch_encode(["a"], 2**70),
        ),
        (ValueError, "vocab_size=-1180591620717411303424", lambda t: t.train_from_iterator(["a"], -(2**70))),
        (
            ValueError,
            "max_memory=18446744073709551616",
            lambda t: t.train_from_iterator(["a"], 300, max_memory=2**64),
        ),
        (
            ValueError,
            "buffer_size=9223372036854775808",
            lambda t: t.train_from_iterator(["a"], 300, buffer_size=2**63),
        ),
        (TypeError, "num_threads: expected int, got str", lambda t: t.encode_batch_numpy(["a"], "2")),
        (TypeError, "vocab_size: expected int, got float", lambda t: t.train_from_iterator(["a"], 3e2)),
        (ValueError, "text: not valid Unicode.*surrogates", lambda t: t.encode(Lying("a\ud800"))),
        (ValueError, r"texts\[1\]: not valid.*surrogates", lambda t: t.batch_encode(["a", Lying("\ud800")])),
        (ValueError, "does not compile", lambda t: t.train_from_iterator(["a"], 300, pattern="(")),
        (
            TypeError,
            "text 1 of the iterator: expected str or an Arrow array of strings, got int",
            lambda t: t.train_from_iterator(["a", 1], 300),
        ),
        (TypeError, "not iterable", lambda t: t.train_from_iterator(7, 300)),
        (TypeError, "Int64Array of int64", lambda t: t.train_from_iterator([pa.array([1])], 300)),
        (ValueError, "max_memory=1000", lambda t: t.train_from_iterator(["a"], 300, max_memory=1000)),
        (ValueError, "text 0 of the iterator.*surrogates", lambda t: t.train_from_iterator(["\ud800"], 300)),
        (ValueError, "surrogates not allowed", lambda t: t.encode("a\udfff")),
        (ValueError, r"texts\[1\].*surrogates", lambda t: t.encode_batch_numpy(["a", "\ud800"])),
        (TypeError, "expected str, got bytes", lambda t: t.encode(b"a")),
        (TypeError, "one str", lambda t: t.encode_batch_numpy("abc")),
        (TypeError, r"texts\[0\]: expected str, got NoneType", lambda t: t.batch_encode([None])),
        (ValueError, "unknown token id 256", lambda t: t.decode([97, 256])),
        (ValueError, "unknown token id -1", lambda t: t.decode([-1])),
        (ValueError, "unknown token id", lambda t: t.decode([2**40])),
        (ValueError, "unknown token id 300", lambda t: t.decode_bytes(np.array([300], dtype=np.uint32))),
        (TypeError, "must be int, got str", lambda t: t.decode(["a"])),
    ],
)
def test_bad_input_is_a_python_exception(error: type[Exception], message: str, call) -> None:
    tokenizer = rustbpe.Tokenizer()
    with pytest.raises(error, match=message):
        call(tokenizer)
    assert tokenizer.encode("ab") == [97, 98]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({b"ab": 257}, "rank 257 .* leaves a gap"),
        ({b"ab": 255}, "twice"),
        ({b"ab": -1}, "negative"),
        ({b"": 256}, "empty"),
        ({b"a": 256}, "ranks 97 and 256 have the same bytes"),
    ],
)
def test_bad_ranks_are_refused(change: dict[bytes, int], message: str) -> None:
    ranks = [*byte_ranks().items(), *change.items()]
    with pytest.raises(ValueError, match=message):
        rustbpe.Tokenizer.from_ranks(ranks, PATTERN)
    with pytest.raises(TypeError, match="ranks"):
        rustbpe.Tokenizer.from_ranks([("a", 1)], PATTERN)


def test_ranks_without_one_of_the_bytes_are_refused() -> None:
    ranks = byte_ranks() | {b"zz": 97}
    del ranks[b"a"]
    with pytest.raises(ValueError, match="lack the single byte 0x61"):
        rustbpe.Tokenizer.from_ranks(ranks, PATTERN)


def test_an_error_of_the_iterator_reaches_the_caller() -> None:
    def texts() -> Iterator[str]:
        yield from ["some text"] * 20_000
        raise KeyError("from the source")

    tokenizer = rustbpe.Tokenizer()
    with pytest.raises(KeyError, match="from the source"):
        tokenizer.train_from_iterator(texts(), 300)
    assert tokenizer.vocab_size == 256


def test_ctrl_c_stops_training_and_leaves_the_tokenizer_as_it_was() -> None:
    def forever() -> Iterator[str]:
        while True:
            yield "the same text again " * 1000

    tokenizer = rustbpe.Tokenizer()
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            tokenizer.train_from_iterator(forever(), 300)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert tokenizer.vocab_size == 256


def test_ctrl_c_stops_the_merging() -> None:
    # All different words: counted in an instant, merged for many seconds.
    letters = np.random.default_rng(0).integers(97, 123, (700_000, 12), dtype=np.uint8)
    text = " ".join(row.tobytes().decode() for row in letters)
    tokenizer = rustbpe.Tokenizer()
    asked: list[int] = []

    def interrupt(read: int, counted: int, merged: int) -> None:
        if merged and not asked:
            asked.append(merged)
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            tokenizer.train_from_iterator([text], 200_000, progress=interrupt)
    finally:
        signal.signal(signal.SIGINT, before)
    assert asked
    assert tokenizer.vocab_size == 256


@pytest.fixture
def ctrl_c_soon() -> Iterator[None]:
    """SIGINT, some time after the test has begun."""
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_ctrl_c_stops_encoding_that_has_no_end(
    trained: rustbpe.Tokenizer, threads: int, ctrl_c_soon: None
) -> None:
    with pytest.raises(KeyboardInterrupt):
        trained.encode_batch_numpy(itertools.repeat("the same text again " * 1000), num_threads=threads)
    assert trained.decode(trained.encode("as before")) == "as before"


@pytest.mark.parametrize(
    "call",
    [
        lambda t, text: t.encode(text),
        lambda t, text: t.encode_numpy(text),
        lambda t, text: t.encode_batch_numpy([text], 1),
        lambda t, text: t.encode_batch_numpy([text, text], 2),
    ],
)
def test_ctrl_c_stops_the_merging_of_one_long_piece(
    trained: rustbpe.Tokenizer, call, ctrl_c_soon: None
) -> None:
    with pytest.raises(KeyboardInterrupt):
        call(trained, "qx" * 25_000_000)
    assert trained.decode(trained.encode("as before")) == "as before"


@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_of_the_iterator_stops_encoding(trained: rustbpe.Tokenizer, threads: int) -> None:
    def texts() -> Iterator[str]:
        yield from ["some text " * 1000] * 100
        raise KeyError("from the source")

    with pytest.raises(KeyError, match="from the source"):
        trained.encode_batch_numpy(texts(), num_threads=threads)


@pytest.mark.parametrize("threads", [1, 2])
def test_texts_are_let_go_as_they_are_encoded(trained: rustbpe.Tokenizer, threads: int) -> None:
    class Text(str):
        """One that weakref can watch."""

    alive, most = 0, 0

    def gone() -> None:
        nonlocal alive
        alive -= 1

    def texts() -> Iterator[str]:
        nonlocal alive, most
        for _ in range(400):
            text = Text("some words of a text " * 5000)
            weakref.finalize(text, gone)
            alive += 1
            most = max(most, alive)
            yield text

    ids, offsets = trained.encode_batch_numpy(texts(), num_threads=threads)
    assert len(offsets) == 401
    assert len(ids) == offsets[-1] == 400 * offsets[1]
    assert alive <= 1  # what the generator still holds
    assert most <= 6 * threads


def test_a_subclass_of_list_is_read_as_it_yields() -> None:
    class Backwards(list[int]):
        def __iter__(self) -> Iterator[int]:
            return reversed(self)

    assert rustbpe.Tokenizer().decode(Backwards([97, 98])) == "ba"


def test_a_subclass_of_str_is_the_text_it_holds(trained: rustbpe.Tokenizer) -> None:
    text = "na\u00efve \u4f60\u597d"
    assert trained.encode(Lying(text)) == trained.encode(text)
    assert trained.batch_encode([Lying(text), Lying("a")], 2) == trained.batch_encode([text, "a"])


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux lists them")
def test_no_more_threads_than_four_a_core_are_made(trained: rustbpe.Tokenizer) -> None:
    def threads_now() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    before, seen = threads_now(), [0]

    def texts() -> Iterator[str]:
        for _ in range(200):
            seen.append(threads_now() - before)
            yield "some words of a text " * 8000

    trained.encode_batch_numpy(texts(), num_threads=1024)
    assert 1 <= max(seen) <= 4 * len(os.sched_getaffinity(0)) - 1


NO_THREADS = """
import hashlib, rustbpe
texts = ["some words of text number %d and its tail " % i * 200 for i in range(100)]
tokenizer = rustbpe.Tokenizer()
report = tokenizer.train_from_iterator(texts, 400, num_threads=4)
ids, offsets = tokenizer.encode_batch_numpy(texts, 4)
print(report, hashlib.sha256(ids.tobytes() + offsets.tobytes()).hexdigest())
"""


def test_without_threads_of_the_system_the_callers_own_does_all() -> None:
    """A stack of 64 TiB, which no machine gives: every thread that is asked for is refused."""
    command = [sys.executable, "-c", NO_THREADS]
    outputs = [
        subprocess.run(
            command, cwd=REPO, env={**os.environ, **env}, capture_output=True, text=True, check=True
        ).stdout
        for env in ({}, {"RUST_MIN_STACK": str(1 << 46)})
    ]
    assert outputs[0] == outputs[1] != ""


@pytest.mark.parametrize("what", ["decode", "decode a part", "split", "encode"])
def test_other_threads_of_python_run_meanwhile(trained: rustbpe.Tokenizer, what: str) -> None:
    text = "some words " * 1_000_000
    ids = np.repeat(trained.encode_numpy("some words "), 2_000_000)
    calls = {
        "decode": lambda: trained.decode_bytes(ids),
        "decode a part": lambda: trained.decode_bytes(ids[::2]),
        "split": lambda: trained.split(text),
        "encode": lambda: trained.encode_numpy(text),
    }
    state = ["waits"]

    def work() -> None:
        state[0] = "works"
        calls[what]()
        state[0] = "done"

    worker = threading.Thread(target=work)
    counted = 0
    worker.start()
    while state[0] != "done":
        counted += state[0] == "works"
    worker.join()
    assert counted > 100


@pytest.mark.parametrize("unit", [b"ab", b"a", b"abcdefg", "\u4e2d".encode()])
def test_a_token_of_many_kilobytes_loads_and_has_the_ids_of_tiktoken(unit: bytes) -> None:
    long = unit * (600_000 // len(unit))
    ranks = byte_ranks() | {unit * 2: 256, unit * 4: 257, long: 258, long + b"b": 259}
    if len(unit) == 2:
        ranks |= {unit: 260}
    ours = rustbpe.Tokenizer.from_ranks(ranks, r"(?s).+")
    assert ours.encode(long.decode()) == [258]
    text = (long[: 1000 * len(unit)]).decode() + "b"
    assert ours.encode(text) == as_tiktoken(ours).encode_ordinary(text)


def test_nulls_are_text_like_any_other(trained: rustbpe.Tokenizer) -> None:
    text = "\x00 a\x00b \x00\x00\x00" * 50
    assert trained.decode(trained.encode(text)) == text
    assert train([text], 300).decode(trained.encode("\x00")[:1]) == "\x00"


@pytest.mark.slow
def test_a_run_of_a_hundred_million_letters_is_encoded(trained: rustbpe.Tokenizer) -> None:
    ids, _ = trained.encode_batch_numpy(["a" * 100_000_000])
    lengths = np.array([len(token) for token, _ in trained.get_mergeable_ranks()])
    assert lengths[ids].sum() == 100_000_000
    assert len(np.unique(ids)) <= 3


def stress(shared_data: Path) -> list[str]:
    """Every file of the stress folder: as UTF-8 with replacements, and its bytes as latin-1."""
    texts = []
    for path in sorted((shared_data / "stress").iterdir()):
        data = path.read_bytes()
        texts += [data.decode("utf-8", errors="replace"), data[:200_000].decode("latin-1")]
    return texts


def prose(shared_data: Path, shard: str, max_bytes: int) -> list[str]:
    texts, total = [], 0
    for text in pq.read_table(shared_data / "prose" / shard).column("text").to_pylist():
        total += len(text.encode())
        if total > max_bytes:
            break
        texts.append(text)
    return texts
