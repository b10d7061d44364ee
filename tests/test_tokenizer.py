"""tokenizer.json, special tokens, and the way from text to ids and back."""

from __future__ import annotations

import argparse
import json
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pytest
import tiktoken.load
import tokenizers

from nanochat.common.errors import UserError
from nanochat.tokenizer.tokenizer import PATTERN, SPECIALS, Tokenizer

VOCAB = 1000


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    text = Path(argparse.__file__).read_text("utf-8")
    return Tokenizer.train([text, "caf\u00e9 \u4f60\u597d \U0001f600" * 5], VOCAB, source="argparse")


@pytest.fixture(scope="module")
def theirs(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> tokenizers.Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture
def saved(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    tokenizer.save(tmp_path)
    return tmp_path


def test_the_file_loads_as_it_was_saved(tokenizer: Tokenizer, saved: Path) -> None:
    loaded = Tokenizer.load(saved)
    assert (loaded.vocab_size, loaded.bos_id, loaded.pattern) == (VOCAB, VOCAB - 9, PATTERN)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode("def main(): # caf\u00e9") == tokenizer.encode("def main(): # caf\u00e9")
    loaded.save(saved / "again")
    assert (saved / "again" / "tokenizer.json").read_bytes() == (saved / "tokenizer.json").read_bytes()


def test_the_file_says_what_it_was_trained_on(saved: Path) -> None:
    about = json.loads((saved / "tokenizer.json").read_text())["model"]["trained_on"]
    assert about["source"] == "argparse"
    assert (about["texts"], about["asked_vocab_size"], about["pruned_pieces"]) == (2, VOCAB, 0)
    assert about["bytes"] == len(Path(argparse.__file__).read_bytes()) + 5 * len(
        "caf\u00e9 \u4f60\u597d \U0001f600".encode()
    )


def test_a_small_corpus_keeps_what_was_asked(tmp_path: Path) -> None:
    small = Tokenizer.train(["ab"], 1000)
    small.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.vocab_size, loaded.trained_on["asked_vocab_size"]) == (256 + 1 + 9, 1000)


def test_columns_of_arrow_give_the_same_vocabulary() -> None:
    texts = Path(argparse.__file__).read_text("utf-8").splitlines(keepends=True)
    assert Tokenizer.train([pa.array(texts)], 500).fingerprint == Tokenizer.train(texts, 500).fingerprint


def test_the_ranks_are_tiktoken_s_in_its_file_too(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "ours.tiktoken"
    ranks_of_ours = tokenizer._bpe.get_mergeable_ranks()
    path.write_text("".join(f"{b64encode(token).decode()} {rank}\n" for token, rank in ranks_of_ours))
    ranks = tiktoken.load.load_tiktoken_bpe(str(path))
    theirs = tiktoken.Encoding("ours", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    text = "def main(): # caf\u00e9 \u4f60\u597d 2024"
    assert theirs.encode_ordinary(text) == tokenizer.encode(text)
    assert Tokenizer.from_ranks_file(path, PATTERN).encode(text) == tokenizer.encode(text)


def test_transformers_gives_the_same_ids(tokenizer: Tokenizer, saved: Path) -> None:
    transformers = pytest.importorskip("transformers")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(saved / "tokenizer.json"))
    text = "def main(): # caf\u00e9 \u4f60\u597d <|bos|>"
    assert fast.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    assert fast.decode(tokenizer.encode(text)) == text
    assert len(fast) == VOCAB


@hypothesis.given(st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=80))
@hypothesis.settings(max_examples=200, deadline=None)
def test_tokenizers_gives_the_same_ids(tokenizer: Tokenizer, theirs: tokenizers.Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert theirs.encode(text).ids == ids
    assert theirs.decode(ids) == tokenizer.decode(ids) == text
    assert theirs.get_vocab_size() == VOCAB
    assert [theirs.token_to_id(name) for name in SPECIALS] == list(range(VOCAB - 9, VOCAB))


@pytest.mark.parametrize("limit", [20_000, pytest.param(None, marks=pytest.mark.slow)])
def test_tokenizers_gives_the_same_ids_on_stress_texts(
    tokenizer: Tokenizer, theirs: tokenizers.Tokenizer, shared_data: Path, limit: int | None
) -> None:
    for path in sorted((shared_data / "stress").iterdir()):
        text = path.read_bytes().decode("utf-8", errors="replace")[:limit]
        ids = tokenizer.encode(text)
        assert theirs.encode(text).ids == ids, path.name
        assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


@pytest.mark.parametrize("name", SPECIALS)
def test_text_never_yields_a_special_token(
    tokenizer: Tokenizer, theirs: tokenizers.Tokenizer, name: str
) -> None:
    text = f"before{name}after {name} {name}"
    ids = tokenizer.encode(text)
    assert max(ids) < tokenizer.bos_id
    assert tokenizer.decode(ids) == text
    assert theirs.encode(text).ids == ids


def test_special_tokens_come_only_when_asked(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("a b", bos=True) == [tokenizer.bos_id, *tokenizer.encode("a b")]
    ids = [tokenizer.bos_id, *tokenizer.encode("hi"), VOCAB - 1]
    assert tokenizer.decode(ids) == "<|bos|>hi<|output_end|>"


def test_batches_hold_the_single_texts_end_to_end(tokenizer: Tokenizer) -> None:
    texts = ["one text", "", "another \u4f60\u597d", "x" * 200]
    ids, offsets = tokenizer.encode_batch(texts, num_threads=2)
    assert (ids.dtype, offsets.dtype) == (np.uint32, np.int64)
    assert [part.tolist() for part in np.split(ids, offsets[1:-1])] == [
        tokenizer.encode(text) for text in texts
    ]


def test_token_bytes_measure_raw_bytes(tokenizer: Tokenizer) -> None:
    lengths = tokenizer.token_bytes()
    assert (lengths.dtype, lengths.shape) == (np.int64, (VOCAB,))
    assert (lengths[:256] == 1).all()
    assert (lengths[-9:] == 0).all()
    assert (lengths[256:-9] > 1).all()
    text = "\u00e9\u4f60\U0001f600 plain"
    assert lengths[tokenizer.encode(text)].sum() == len(text.encode())


def test_tiktoken_ranks_load(shared_data: Path, tmp_path: Path) -> None:
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    gpt2 = Tokenizer.from_ranks_file(shared_data / "bpe" / "r50k_base.tiktoken", pattern)
    theirs = tokenizers.Tokenizer.from_file(str(shared_data / "bpe" / "gpt2_tokenizer.json"))
    text = "Hello, world: it's 2024!  na\u00efve"
    assert gpt2.encode(text) == theirs.encode(text).ids
    gpt2.save(tmp_path)
    assert Tokenizer.load(tmp_path).encode(text) == gpt2.encode(text)
    (tmp_path / "bad.tiktoken").write_text("IQ== 0\nI= 1\n")
    with pytest.raises(UserError, match="bad.tiktoken"):
        Tokenizer.from_ranks_file(tmp_path / "bad.tiktoken", PATTERN)
    with pytest.raises(UserError, match="no such file"):
        Tokenizer.from_ranks_file(tmp_path / "absent.tiktoken", PATTERN)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("max_memory=5", lambda t: Tokenizer.train(["text"], 300, max_memory=5)),
        ("vocab_size=264: .* need 265", lambda t: Tokenizer.train(["text"], 264)),
        ("no text", lambda t: Tokenizer.train([], 1000)),
        ("no text", lambda t: Tokenizer.train(["", ""], 1000)),
        ("surrogates", lambda t: Tokenizer.train(["ok", "\ud800"], 1000)),
        ("surrogates", lambda t: t.encode("\ud800")),
        (r"texts\[1\].*surrogates", lambda t: t.encode_batch(["ok", "\ud800"])),
        ("unknown token id 1000: .* 0 to 999", lambda t: t.decode([1000])),
        ("unknown token id -1", lambda t: t.decode_bytes([5, -1])),
    ],
)
def test_bad_input_is_the_users_mistake(
    tokenizer: Tokenizer, message: str, call: Callable[[Tokenizer], Any]
) -> None:
    with pytest.raises(UserError, match=message):
        call(tokenizer)


def _drop_a_merge(document: dict[str, Any]) -> None:
    del document["model"]["merges"][5]


def _swap_ids(document: dict[str, Any]) -> None:
    vocab = document["model"]["vocab"]
    first, second = list(vocab)[300:302]
    vocab[first], vocab[second] = vocab[second], vocab[first]


def _use_an_unknown_character(document: dict[str, Any]) -> None:
    vocab = document["model"]["vocab"]
    vocab["\u4f60"] = vocab.pop("!")


@pytest.mark.parametrize(
    ("message", "damage"),
    [
        ("'model' is NoneType", lambda d: d.pop("model")),
        ("'merges' is NoneType", lambda d: d["model"].pop("merges")),
        ("'merges' has 734 entries", _drop_a_merge),
        ("'merges' has 735 entries", _swap_ids),
        ("'vocab' is list", lambda d: d["model"].update(vocab=[])),
        ("none with id 400", lambda d: d["model"]["vocab"].pop(list(d["model"]["vocab"])[400])),
        ("none with id 7", lambda d: d["model"]["vocab"].update({list(d["model"]["vocab"])[7]: "7"})),
        ("the last 9 entries", lambda d: d["model"]["vocab"].update({"<|pad|>": VOCAB})),
        ("stands for no byte", _use_an_unknown_character),
        ("'pattern' is NoneType", lambda d: d["pre_tokenizer"].update(pretokenizers=[])),
        ("'pre_tokenizer' is NoneType", lambda d: d.update(pre_tokenizer=None)),
        ("does not compile", lambda d: d["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="(")),
    ],
)
def test_a_damaged_file_is_named_and_refused(
    saved: Path, message: str, damage: Callable[[dict[str, Any]], Any]
) -> None:
    path = saved / "tokenizer.json"
    document = json.loads(path.read_text("utf-8"))
    damage(document)
    path.write_text(json.dumps(document), "utf-8")
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer.load(saved)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("contents", ["", "{", "[]", "null", '{"model": 3}', "\x00"])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, contents: str) -> None:
    (tmp_path / "tokenizer.json").write_text(contents)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_an_absent_or_truncated_file_is_refused(saved: Path, tmp_path: Path) -> None:
    path = saved / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(UserError, match="not a JSON file"):
        Tokenizer.load(saved)
    with pytest.raises(UserError, match="no such file"):
        Tokenizer.load(tmp_path / "nowhere")
