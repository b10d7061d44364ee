"""P5: a damaged tokenizer.json is found and named before it is used."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from nanochat.errors import UserError
from nanochat.tokenizer import Tokenizer
from tests.reliability import record

FLIPS = 500


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "tokenizer"
    Tokenizer.train(["some text, and 12 more words of text " * 9, "caf\u00e9"], 300, source="here").save(
        folder
    )
    return folder


def named(folder: Path) -> bool:
    """Whether loading is refused with the path."""
    with pytest.raises(UserError) as caught:
        Tokenizer.load(folder)
    return str(folder / "tokenizer.json") in str(caught.value)


def test_every_flipped_bit_and_every_cut_of_a_tokenizer_is_found(saved: Path) -> None:
    path = saved / "tokenizer.json"
    whole = path.read_bytes()
    rng = random.Random(0)
    found = 0
    for bit in rng.sample(range(8 * len(whole)), FLIPS):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        found += named(saved)
    for length in [0, *rng.sample(range(1, len(whole)), 19), len(whole) - 1]:
        path.write_bytes(whole[:length])
        found += named(saved)
    record("P5", n=FLIPS + 21, failures=FLIPS + 21 - found, worst=0, unit="damaged tokenizers")
    assert found == FLIPS + 21
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
