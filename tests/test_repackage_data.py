"""Repackaging: each document once, in an order that depends on the documents and the seed alone."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dev import repackage_data
from dev.repackage_data import Source, Spill, repackage
from nanochat.common.errors import UserError
from nanochat.data.corpus import Corpus

TEXTS = [f"document {i} " + "words " * (i % 40) for i in range(3000)]


def write(folder: Path, parts: int = 4, seed: int = 0) -> Source:
    """The documents, some of them several times, in a random order in files of all kinds."""
    folder.mkdir()
    mixed = TEXTS + TEXTS[:500] + TEXTS[100:200]
    random.Random(seed).shuffle(mixed)
    paths = []
    for part in range(parts):
        texts = mixed[part::parts]
        if part % 2:
            path = folder / f"{part}.parquet"
            pq.write_table(pa.table({"text": [*texts, None, ""]}), path)
        else:
            path = folder / f"{part}.jsonl"
            path.write_text("\n".join(json.dumps({"text": text}) for text in texts), "utf-8")
        paths.append(path)
    return Source(tuple(paths))


def texts_of(corpus: Corpus, split: str) -> list[str]:
    chosen = [shard for shard in corpus.shards if shard.split == split]
    return [t for s in chosen for group in range(s.row_groups) for t in corpus.read_block(s, group)]


def test_every_document_is_there_once_shuffled_with_some_held_out(tmp_path: Path, base_dir: Path) -> None:
    corpus = repackage(write(tmp_path / "in"), "mine", buckets=7)
    train, val = texts_of(corpus, "train"), texts_of(corpus, "val")
    assert sorted(train + val) == sorted(TEXTS)
    assert len(val) == 36  # one in 100 of what was read
    numbers = [int(text.split()[1]) for text in train]
    assert abs(sum(a < b for a, b in zip(numbers, numbers[1:], strict=False)) / len(numbers) - 0.5) < 0.05
    assert [shard.row_groups for shard in corpus.shards] == [3, 1]
    sizes = [pq.ParquetFile(corpus.path(corpus.shards[0])).metadata.row_group(i).num_rows for i in range(3)]
    assert sizes == [1000, 1000, 964]
    assert [path.name for path in (base_dir / "data").iterdir()] == ["mine"]


def test_the_order_depends_on_the_documents_and_the_seed_alone(tmp_path: Path) -> None:
    source = write(tmp_path / "a")
    first = repackage(source, "first", buckets=7)
    other_files = write(tmp_path / "b", parts=3, seed=5)
    assert repackage(other_files, "second", buckets=16).fingerprint == first.fingerprint
    assert repackage(source, "third", buckets=3, workers=2).fingerprint == first.fingerprint
    assert repackage(source, "fourth", seed=1).fingerprint != first.fingerprint


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
@pytest.mark.slow
def test_ray_gives_the_same_shards(tmp_path: Path) -> None:
    source = write(tmp_path / "a")
    expected = repackage(source, "plain")
    assert repackage(source, "ray", workers=3, use_ray=True).fingerprint == expected.fingerprint


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="datasets is not installed")
def test_a_streamed_data_set_gives_the_same_shards(tmp_path: Path) -> None:
    write(tmp_path / "a", parts=4)
    for path in (tmp_path / "a").glob("*.jsonl"):
        path.unlink()
    paths = tuple(sorted((tmp_path / "a").glob("*.parquet")))
    expected = repackage(Source(paths), "plain")
    streamed = Source(dataset=str(tmp_path / "a"))
    assert repackage(streamed, "streamed").fingerprint == expected.fingerprint
    assert repackage(streamed, "workers", workers=2).fingerprint == expected.fingerprint
    with pytest.raises(UserError, match="has 2 files"):
        repackage(streamed, "too-many", workers=3)
    with pytest.raises(UserError, match="--column content"):
        repackage(Source(dataset=str(tmp_path / "a"), column="content"), "other")


def test_no_bucket_holds_much_more_than_its_share(tmp_path: Path) -> None:
    spill = Spill(tmp_path / "spill", buckets=8, seed=0)
    spill.folder.mkdir()
    assert spill.write(write(tmp_path / "in"), 0, 1) == 3600
    sizes = [path.stat().st_size for path in spill.folder.iterdir()]
    assert len(sizes) == 8
    assert max(sizes) < 1.2 * sum(sizes) / 8
    assert len(list(spill.read())) == 3000
    assert list(spill.folder.iterdir()) == []


def test_long_documents_are_cut_and_empty_ones_dropped(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(
        "\n".join(json.dumps({"text": text}) for text in ["", "  ", "x y " * 500_000, "end"]), "utf-8"
    )
    corpus = repackage(Source((tmp_path / "x.jsonl",)), "mine")
    assert max(len(text) for text in texts_of(corpus, "train")) <= 1_000_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", "x"], "--files or with --dataset"),
        (["--name", "x", "--files", "a", "--dataset", "b"], "--files or with --dataset"),
        (["--name", "x", "--files", "absent.txt"], "absent.txt: no such file"),
        (["--name", "../x", "--files", __file__], "expected a file that ends in"),
        (["--name", "x", "--files", "absent.txt", "--buckets", "0"], "expected 1 or more"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["repackage_data", *arguments])
    with pytest.raises(SystemExit) as left:
        repackage_data.main()
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_corpus_is_not_replaced_and_a_failure_leaves_nothing(tmp_path: Path, base_dir: Path) -> None:
    repackage(write(tmp_path / "a"), "mine")
    with pytest.raises(UserError, match="is there already"):
        repackage(write(tmp_path / "b"), "mine")
    (tmp_path / "one.jsonl").write_text('{"text": "alone"}', "utf-8")
    with pytest.raises(UserError, match="no text for the train split"):
        repackage(Source((tmp_path / "one.jsonl",)), "other")
    assert [path.name for path in (base_dir / "data").iterdir()] == ["mine"]
