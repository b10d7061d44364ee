"""The two commands of the tokenizer: training from a corpus through Arrow, and bytes per token."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from nanochat.common import files
from nanochat.common.errors import UserError
from nanochat.config.arguments import TokTrainArgs
from nanochat.data import parquet_shards, tokenizer_texts
from nanochat.data.corpus import Corpus
from nanochat.data.tokenizer_texts import validation_text
from nanochat.tokenizer import compression
from nanochat.tokenizer.tokenizer import Tokenizer
from tests.conftest import REPO

TEXTS = [f"document {i} caf\u00e9 \u4f60\u597d {'word ' * (i % 50)}" for i in range(2500)]


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    members = parquet_shards.write_shards(TEXTS, tmp_path, "train", 0)
    members += parquet_shards.write_shards(["held out text", "and more"], tmp_path, "val", 1)
    return Corpus(tmp_path, "small", "local test", members)


@pytest.mark.parametrize("max_chars", [0, 1, 19, 20, 5000, 150_000, 10**9])
@pytest.mark.parametrize("doc_cap", [1, 12, 10_000])
def test_columns_hold_the_texts_of_the_corpus(corpus: Corpus, max_chars: int, doc_cap: int) -> None:
    columns = tokenizer_texts.columns(corpus, max_chars=max_chars, doc_cap=doc_cap)
    texts = [text for column in columns for text in column.to_pylist()]
    given, expected = 0, []
    for text in TEXTS:
        if given < max_chars:
            expected.append(text[:doc_cap])
            given += len(expected[-1])
    assert texts == expected


def test_training_says_what_it_did(corpus: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tokenizer_texts.train(corpus, TokTrainArgs(corpus="small", vocab_size=5000))
    expected = Tokenizer.train(TEXTS, 5000, source=corpus.fingerprint)
    assert tokenizer.fingerprint == expected.fingerprint
    said = capsys.readouterr().out
    assert f"trained {tokenizer.vocab_size} entries on 0.4 MB" in said
    assert "no more pairs: 5000 entries were asked" in said


def test_a_damaged_shard_stops_the_training(corpus: Corpus) -> None:
    path = corpus.path(corpus.train_shards[0])
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="damaged.*Repair"):
        tokenizer_texts.train(corpus, TokTrainArgs(vocab_size=300))


def test_bytes_per_token_are_counted_by_hand(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["abab"] * 9, 256 + 9 + 1)
    rows = compression.measure({"one": "ab ab", "wide": "\u4f60", "none": ""}, {"ours": tokenizer})
    # "ab" is one token and " ab" two; each byte of the character is one.
    assert [(row.text, row.bytes, row.bytes_per_token["ours"]) for row in rows] == [
        ("one", 5, 5 / 3),
        ("wide", 3, 1.0),
    ]


def test_published_vocabularies_are_measured_beside_ours(shared_data: Path, tmp_path: Path) -> None:
    ours = Tokenizer.train(["some text to learn from"] * 5, 300)
    tokenizers = compression.vocabularies(ours, shared_data / "bpe")
    # 50,257 and 100,277 with the special tokens of their own; nine here.
    assert {name: t.vocab_size for name, t in tokenizers.items()} == {
        "ours": ours.vocab_size,
        "GPT-2": 50256 + 9,
        "cl100k": 100256 + 9,
    }
    rows = compression.measure(compression.samples(REPO / "dev" / "samples"), tokenizers)
    by_name = {row.text: row.bytes_per_token for row in rows}
    assert {"code", "english", "mathematics", "chinese", "arabic", "thai"} <= set(by_name)
    assert 4.5 < by_name["english"]["GPT-2"] < 6.0
    assert by_name["code"]["cl100k"] > by_name["code"]["GPT-2"] > by_name["code"]["ours"]
    assert by_name["chinese"]["cl100k"] > by_name["chinese"]["GPT-2"]

    shown = compression.table(rows, tokenizers)
    assert f"{by_name['english']['GPT-2']:.3f}" in shown
    written = compression.write(tmp_path, rows, tokenizers)
    document = files.read_json(written[0])
    assert isinstance(document, dict)
    assert document["vocab_size"]["GPT-2"] == 50265
    assert len(document["texts"]) == len(rows)
    for path in written[1:]:
        drawing = ElementTree.parse(path).getroot()
        assert drawing.tag == "{http://www.w3.org/2000/svg}svg"


def test_a_bad_folder_of_samples_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \.txt file"):
        compression.samples(tmp_path)
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"bad\.txt: not UTF-8"):
        compression.samples(tmp_path)
    with pytest.raises(UserError, match="r50k_base"):
        compression.vocabularies(Tokenizer.train(["ab"], 300), tmp_path)


def test_the_validation_text_is_the_corpus_own(corpus: Corpus) -> None:
    assert validation_text(corpus, compression.MAX_CHARS) == "held out text\n\nand more"
