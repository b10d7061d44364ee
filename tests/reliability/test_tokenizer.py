"""P5: a damaged tokenizer.json is found and named before it is used."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from nanochat.common.errors import UserError
from nanochat.tokenizer.tokenizer import Tokenizer
from tests.reliability.figures import Figure

FLIPS = 500


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "tokenizer"
    texts = ["some text, and 12 more words of text " * 9, "caf\u00e9"]
    Tokenizer.train(texts, 300, source="here").save(folder)
    return folder


def require_named(folder: Path) -> None:
    """Loading is refused with the path."""
    with pytest.raises(UserError) as caught:
        Tokenizer.load(folder)
    assert str(folder / "tokenizer.json") in str(caught.value)


def test_every_flipped_bit_and_every_cut_of_a_tokenizer_is_found(
    saved: Path, figure: Callable[..., Figure]
) -> None:
    path = saved / "tokenizer.json"
    whole = path.read_bytes()
    rng = random.Random(0)
    damaged = figure("P5", "damaged tokenizers")
    for bit in rng.sample(range(8 * len(whole)), FLIPS):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with damaged.trial(f"bit {bit}"):
            require_named(saved)
    for length in [0, *rng.sample(range(1, len(whole)), 19), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with damaged.trial(f"cut to {length} bytes"):
            require_named(saved)
    path.write_bytes(whole)
    Tokenizer.load(saved)


def test_planted_without_the_digest_another_pattern_and_another_origin_pass(saved: Path) -> None:
    """What only the digest finds: both files are whole JSON and agree with themselves otherwise."""
    path = saved / "tokenizer.json"
    text = path.read_text("utf-8")
    for old, new in (("{1,2}", "{1,3}"), ('"here"', '"there"')):
        changed = text.replace(old, new, 1)
        assert changed != text
        json.loads(changed)
        path.write_text(changed, "utf-8")
        with pytest.raises(UserError, match="sha256"):
            Tokenizer.load(saved)
