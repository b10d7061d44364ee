"""The page of plain Python in rustbpe/ makes the merges, ids and texts that the crate makes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

import rustbpe
from nanochat.tokenizer.tokenizer import GPT2_PATTERN, PATTERN, Tokenizer
from tests.conftest import REPO
from tests.shard_files import read_texts

PAGE = REPO / "rustbpe" / "educational.py"
SPEC = importlib.util.spec_from_file_location("educational", PAGE)
assert SPEC is not None
assert SPEC.loader is not None
educational = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(educational)

TEXTS = [
    "The cat sat on the mat. It's the cat's mat, isn't it? THEY'LL SEE.",
    "aaa aaaa aaaaa baaa\tabababab  ab ab\n\n\n    indented, by four spaces \r\n",
    "na\u00efve caf\u00e9, \u4f60\u597d\u4e16\u754c, \U0001f600\U0001f600 1234567",
    "\u0645\u0631\u062d\u0628\u0627",
    "",
]


def assert_equal(texts: list[str], others: list[str], merges: int, pattern: str) -> None:
    """Merges learnt from `texts`, and the ids of all texts with them."""
    crate = rustbpe.Tokenizer()
    crate.train_from_iterator(texts, 256 + merges, pattern=pattern)
    learnt = educational.train(educational.count_pieces(texts, pattern), merges)
    assert learnt == crate.get_merges()
    tokens = educational.tokens_of(learnt)
    ranks = {token: rank for rank, token in enumerate(tokens)}
    assert list(ranks.items()) == crate.get_mergeable_ranks()
    for text in [*texts, *others]:
        ids = educational.encode(text, pattern, ranks)
        assert ids == crate.encode(text)
        assert educational.decode(ids, tokens) == crate.decode(ids) == text
        assert educational.decode(ids[1::2], tokens) == crate.decode(ids[1::2])


@pytest.mark.parametrize("merges", [0, 1, 30, 10_000])
@pytest.mark.parametrize("pattern", [educational.PATTERN, PATTERN, GPT2_PATTERN])
def test_a_small_text_gives_the_same_merges_and_ids(merges: int, pattern: str) -> None:
    assert_equal(TEXTS, ["another text: the mat's cats", "\u4e16 aaaaaaaab"], merges, pattern)


def test_its_pattern_is_the_crate_s() -> None:
    assert rustbpe.Tokenizer().get_pattern() == educational.PATTERN


def test_prose_gives_the_same_merges_and_ids(shared_data: Path) -> None:
    texts = read_texts(shared_data / "prose" / "shard_00000.parquet", 0)
    assert_equal(texts[:15], texts[15:25], 150, PATTERN)


def test_gpt2s_ranks_give_the_same_ids(shared_data: Path) -> None:
    """They are not in the order of bytes, and not every piece that is a token is made by merges."""
    gpt2 = Tokenizer.from_ranks_file(shared_data / "bpe" / "r50k_base.tiktoken", GPT2_PATTERN)
    ranks = dict(gpt2._bpe.get_mergeable_ranks())
    texts = read_texts(shared_data / "prose" / "shard_00010.parquet", 0)[:20]
    for text in [*TEXTS, *texts]:
        assert educational.encode(text, GPT2_PATTERN, ranks) == gpt2.encode(text)


def test_it_is_a_page() -> None:
    assert len(PAGE.read_text("utf-8").splitlines()) <= 150
