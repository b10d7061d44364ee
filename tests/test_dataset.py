"""Corpora on the disk: damage is named before use; nothing is made twice, or replaced in silence."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.common import files
from nanochat.common.errors import UserError
from nanochat.data import corpus as corpus_module
from nanochat.data import parquet_shards, sources
from nanochat.data.corpus import Corpus, prepare
from scripts import dataset as dataset_command
from tests.shard_files import read_texts


def make(folder: Path, documents: int = 250, name: str = "local") -> Corpus:
    """A corpus of numbered documents with row groups of 1000 and a validation file."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", documents), ("val", 20)):
        lines = [json.dumps({"text": f"{split} document {i} " + "x" * (i % 50)}) for i in range(count)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines), "utf-8")
    return prepare("local", named_files=[str(folder)], val_file="val.jsonl", name=name)


def texts_of(corpus: Corpus, split: str) -> list[str]:
    chosen = [shard for shard in corpus.shards if shard.split == split]
    return [
        t for shard in chosen for group in range(shard.row_groups) for t in corpus.read_block(shard, group)
    ]


def test_a_local_corpus_holds_every_document_in_its_split(tmp_path: Path) -> None:
    corpus = make(tmp_path / "in", documents=2500)
    assert sorted(texts_of(corpus, "val")) == sorted(f"val document {i} " + "x" * (i % 50) for i in range(20))
    assert len(texts_of(corpus, "train")) == len(set(texts_of(corpus, "train"))) == 2500
    assert [shard.row_groups for shard in corpus.shards] == [3, 1]
    manifest = json.loads((corpus.folder / "manifest.json").read_text("utf-8"))
    assert (manifest["format"], manifest["name"]) == (1, "local")
    assert sorted(manifest["shards"][0]) == ["bytes", "documents", "name", "row_groups", "sha256", "split"]
    assert sorted(p.name for p in corpus.folder.iterdir()) == [
        "manifest.json",
        *(s.name for s in corpus.shards),
    ]


def test_the_same_files_make_the_same_bytes(tmp_path: Path) -> None:
    first, second = make(tmp_path / "in", name="a"), make(tmp_path / "in", name="b")
    assert first.fingerprint == second.fingerprint
    assert first.fingerprint != make(tmp_path / "other", documents=251, name="c").fingerprint


def test_making_again_does_nothing_and_other_files_are_refused(tmp_path: Path) -> None:
    corpus = make(tmp_path / "in")
    before = {p: p.stat().st_mtime_ns for p in corpus.folder.iterdir()}
    make(tmp_path / "in")
    assert {p: p.stat().st_mtime_ns for p in corpus.folder.iterdir()} == before
    assert prepare("local").fingerprint == corpus.fingerprint
    with pytest.raises(UserError, match="holds a corpus from another source"):
        make(tmp_path / "other", documents=10)
    with pytest.raises(UserError, match="holds a corpus from another source"):
        prepare("stdlib", name="local")


def test_eight_makers_of_one_corpus_make_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    write = corpus_module.write_corpus

    def spy(folder: Path, *rest: Any) -> None:
        made.append(folder)
        write(folder, *rest)

    monkeypatch.setattr(corpus_module, "write_corpus", spy)
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"document {i}"}) for i in range(300)), "utf-8")
    with ThreadPoolExecutor(8) as pool:
        make_it = partial(prepare, "local", named_files=[str(path)], name="once")
        found = {corpus.fingerprint for corpus in pool.map(lambda _: make_it(), range(8))}
    assert len(found) == len(made) == 1
    assert [entry.name for entry in made[0].parent.iterdir()] == ["once"]


def test_what_a_killed_maker_left_goes_when_the_corpus_is_made_again(tmp_path: Path) -> None:
    left = files.data_dir("local").with_name(".tmp-local@0123abcd.1")  # of a container that is no more
    left.mkdir(parents=True)
    corpus = make(tmp_path / "in")
    assert [entry.name for entry in corpus.folder.parent.iterdir()] == ["local"]


def test_a_lost_shard_is_made_again(tmp_path: Path) -> None:
    corpus = make(tmp_path / "in")
    corpus.path(corpus.shards[0]).unlink()
    with pytest.raises(UserError, match=r"shard_00000\.parquet: the shard is missing.*Repair: "):
        Corpus.open("local")
    assert make(tmp_path / "in").fingerprint == corpus.fingerprint


def test_without_a_validation_file_the_end_is_held_out(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"{i}"}) for i in range(1000)), "utf-8")
    corpus = prepare("local", named_files=[str(path)])
    held = sorted(texts_of(corpus, "val"), key=int)
    assert held == [str(i) for i in range(1000 - len(held), 1000)]
    assert len("".join(held)) == 291  # the documents that reach 289: a tenth, since the text is short


@pytest.mark.parametrize("content", ["", "\n\n", "   "])
def test_an_empty_corpus_is_refused_and_leaves_nothing(tmp_path: Path, base_dir: Path, content: str) -> None:
    (tmp_path / "x.txt").write_text(content)
    with pytest.raises(UserError, match="no text for the train split"):
        prepare("local", named_files=[str(tmp_path / "x.txt")])
    assert list((base_dir / "data").iterdir()) == []


def test_every_bit_flip_and_truncation_is_found_and_named(tmp_path: Path) -> None:
    corpus = make(tmp_path / "in")
    shard = corpus.train_shards[0]
    path = corpus.path(shard)
    good = path.read_bytes()
    rng = random.Random(0)
    cases = []
    for _ in range(60):
        bit = rng.randrange(8 * len(good))
        flipped = bytearray(good)
        flipped[bit // 8] ^= 1 << bit % 8
        cases.append(bytes(flipped))
    cases += [good[: rng.randrange(len(good))] for _ in range(20)]
    cases += [b"", good + b"\0", corpus.path(corpus.val_shards[0]).read_bytes()]
    for damaged in cases:
        path.write_bytes(damaged)
        with pytest.raises(UserError) as caught:
            Corpus.open("local").read_block(shard, 0)
        for part in (
            str(path),
            shard.sha256,
            files.sha256(path),
            "Repair: rm -rf",
            "scripts.dataset --corpus local",
        ):
            assert part in str(caught.value)
    path.write_bytes(good)
    assert len(Corpus.open("local").read_block(shard, 0)) == 250


def test_what_changes_after_the_first_hash_is_found(tmp_path: Path) -> None:
    corpus = make(tmp_path / "in")
    shard = corpus.train_shards[0]
    corpus.read_block(shard, 0)
    data = bytearray(corpus.path(shard).read_bytes())
    data[len(data) // 3] ^= 1
    corpus.path(shard).write_bytes(data)
    with pytest.raises(UserError, match=r"bytes 0 to \d+ have changed since the file was hashed.* Repair: "):
        corpus.read_block(shard, 0)


def test_a_damaged_validation_shard_stops_before_anything_is_read(tmp_path: Path) -> None:
    corpus = make(tmp_path / "in")
    path = corpus.path(corpus.val_shards[0])
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="is damaged"):
        Corpus.open("local")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format", 2),
        ("name", "../../etc/passwd.parquet"),
        ("name", "/shard.parquet"),
        ("split", "test"),
        ("bytes", -1),
        ("bytes", "12"),
        ("row_groups", True),
        ("sha256", None),
    ],
)
def test_a_manifest_that_is_not_ours_is_refused(tmp_path: Path, field: str, value: object) -> None:
    corpus = make(tmp_path / "in")
    path = corpus.folder / "manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    (manifest if field == "format" else manifest["shards"][0])[field] = value
    path.write_text(json.dumps(manifest), "utf-8")
    with pytest.raises(UserError, match=r"manifest\.json: "):
        Corpus.open("local")


@pytest.mark.parametrize(
    "text", ["[]", "{}", "null", '{"format": 1}', '{"format": 1, "name": "x", "source": "y", "shards": []}']
)
def test_a_manifest_without_its_fields_is_refused(base_dir: Path, text: str) -> None:
    files.atomic_write(base_dir / "data" / "x" / "manifest.json", text)
    with pytest.raises(UserError, match=r"manifest\.json: "):
        Corpus.open("x")


def test_nulls_and_empty_strings_are_dropped_and_a_row_group_of_one_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": ["a", None, "", "b"]}), path, row_group_size=3)
    assert read_texts(path, 0) == ["a"]
    assert read_texts(path, 1) == ["b"]


def test_row_groups_beyond_the_limits_are_refused_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bomb.parquet"
    pq.write_table(pa.table({"text": [""] * (parquet_shards.MAX_GROUP_ROWS + 1)}), path)
    with pytest.raises(UserError, match="row group 0 has 65537 rows"):
        read_texts(path, 0)
    monkeypatch.setattr(parquet_shards, "MAX_GROUP_BYTES", 1 << 20)
    pq.write_table(pa.table({"text": ["\0" * (1 << 20)] * 2}), path, compression="zstd", use_dictionary=False)
    assert path.stat().st_size < 5_000
    with pytest.raises(UserError, match="bytes are read at a time"):
        read_texts(path, 0)


def test_two_hundred_mutations_of_a_parquet_file_give_its_text_or_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    parquet_shards.write_shards([f"document {i}" for i in range(50)], tmp_path, "train", 0)
    good = (tmp_path / "shard_00000.parquet").read_bytes()
    right = [f"document {i}" for i in range(50)]
    rng = random.Random(0)
    refused = 0
    for _ in range(200):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            assert read_texts(path, 0) == right
        except UserError:
            refused += 1
    assert refused > 100


def test_long_documents_end_a_row_group_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_shards, "GROUP_CHARS", 1000)
    monkeypatch.setattr(parquet_shards, "SHARD_CHARS", 3000)
    written = parquet_shards.write_shards(["x" * 400] * 20, tmp_path, "train", 5)
    assert [(s.name, s.row_groups, s.documents) for s in written] == [
        ("shard_00005.parquet", 3, 9),
        ("shard_00006.parquet", 3, 9),
        ("shard_00007.parquet", 1, 2),
    ]


def test_a_row_of_50_mb_is_written_and_read_back(tmp_path: Path) -> None:
    long = "a row of fifty megabytes \u00e9\n" * 2_000_000
    [shard] = parquet_shards.write_shards(["before", long, "after"], tmp_path, "train", 0)
    assert shard.row_groups == 2  # it ends its row group
    assert read_texts(tmp_path / shard.name, 0) == ["before", long]
    assert read_texts(tmp_path / shard.name, 1) == ["after"]


def test_stdlib_is_made_once(base_dir: Path) -> None:
    corpus = prepare("stdlib")
    assert corpus.name == "stdlib"
    assert sum(s.documents for s in corpus.train_shards) > 1000
    before = (corpus.folder / "manifest.json").stat().st_mtime_ns
    assert prepare("stdlib").fingerprint == corpus.fingerprint
    assert (corpus.folder / "manifest.json").stat().st_mtime_ns == before


def test_a_file_edited_in_its_middle_is_another_source(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    text = "".join(f"line {i} of a text\n" for i in range(15_000))
    path.write_text(text)
    first = prepare("local", named_files=[str(path)])
    assert prepare("local", named_files=[str(path)]).fingerprint == first.fingerprint
    path.write_text(text[:100_000] + text[100_000:200_000].upper() + text[200_000:])
    with pytest.raises(UserError, match="its files have changed since"):
        prepare("local", named_files=[str(path)])
    assert Corpus.open("local").fingerprint == first.fingerprint


def test_a_corpus_that_an_earlier_release_made_is_known_again(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("some text\n\n" * 2000)
    corpus = prepare("local", named_files=[str(path)])
    manifest = json.loads((corpus.folder / "manifest.json").read_text("utf-8"))
    manifest["source"] = f"local files, 1 of listing {sources.listing_digest([path], None)}"
    (corpus.folder / "manifest.json").write_text(json.dumps(manifest))
    assert prepare("local", named_files=[str(path)]).source == manifest["source"]


def test_a_link_to_another_disk_stays_and_the_data_are_behind_it(tmp_path: Path, base_dir: Path) -> None:
    (tmp_path / "x.txt").write_text("some text\n\n" * 2000)
    for name, there in (("empty", True), ("dangling", False)):
        behind = tmp_path / "disk" / f"{name}-there"
        if there:
            behind.mkdir(parents=True)
        link = base_dir / "data" / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(behind)
        corpus = prepare("local", named_files=[str(tmp_path / "x.txt")], name=name)
        assert link.is_symlink()
        assert (behind / "manifest.json").is_file()
        assert (corpus.name, Corpus.open(name).fingerprint) == (name, corpus.fingerprint)
    assert sorted(p.name for p in (base_dir / "data").iterdir()) == ["dangling", "empty"]
    assert sorted(p.name for p in (tmp_path / "disk").iterdir()) == ["dangling-there", "empty-there"]


def test_the_list_goes_on_past_a_damaged_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b", "c", "d"):
        make(tmp_path / name, name=name)
    for name, text in (("b", "{"), ("c", "[]")):
        (files.data_dir(name) / "manifest.json").write_text(text)
    monkeypatch.setattr(sys, "argv", ["dataset", "--list"])
    with pytest.raises(SystemExit) as left:
        dataset_command.main()
    said = capsys.readouterr()
    assert left.value.code == 2
    assert [line[:3] for line in said.out.splitlines()] == ["a: ", "d: "]
    assert said.err.count("manifest.json") >= 2


def test_a_folder_says_what_it_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("some text\n\n" * 2000)
    (tmp_path / "b.pdf").write_text("x")
    prepare("local", named_files=[str(tmp_path)])
    assert "1 files were left out: .pdf (1); b.pdf. What is read: .txt" in capsys.readouterr().out


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "scripts.dataset", *arguments], capture_output=True, text=True
    )


def test_the_command_line_makes_lists_and_verifies(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("some text\n\n" * 2000)
    made = run_cli("--corpus", "local", "--files", str(tmp_path), "--name", "mine")
    assert made.returncode == 0, made.stderr
    assert "mine: " in made.stdout
    assert "mine: " in run_cli("--list").stdout
    assert "2 shards verified" in run_cli("--corpus", "mine", "--verify").stdout
    path = corpus_module.Corpus.open("mine").folder / "shard_00000.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    wrong = run_cli("--corpus", "mine", "--verify")
    assert wrong.returncode == 2
    assert "1 of 2 shards are wrong" in wrong.stderr
    assert "shard_00000.parquet" in wrong.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--corpus", "nonsense"], "--corpus nonsense: expected stdlib"),
        (["--corpus", "local"], "name the text with --files"),
        (["--corpus", "stdlib", "-n", "3"], "-n and --first choose shards of"),
        (["--corpus", "stdlib", "--files", "x"], "use --corpus local"),
        (["--corpus", "fineweb-edu", "-n", "0"], "has 1 to 1822 training shards"),
        (["--corpus", "fineweb-edu", "-n", "9", "--first", "-1"], "--first=-1: expected 0 or more"),
        (["--corpus", "local", "--files", "absent.txt"], "absent.txt: no such file"),
        (["--corpus", "stdlib", "--name", "../x"], "expected a name of up to 128 letters"),
        (["--corpus", "absent", "--verify"], "is not there. Make it"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["dataset", *arguments])
    with pytest.raises(SystemExit) as left:
        dataset_command.main()
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
