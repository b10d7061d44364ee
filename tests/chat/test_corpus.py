"""Chat corpora: made, of the user's files, of a hub; their splits, their refusals, and mixtures of them."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.chat import corpus as chat_corpus
from nanochat.chat import made
from nanochat.chat.corpus import ChatCorpus, mixture, prepare
from nanochat.common import files
from nanochat.common.errors import UserError
from nanochat.config.arguments import ChatDataArgs
from nanochat.data import hub
from nanochat.data.corpus import Corpus
from scripts import chat_data, dataset
from tests import hub_server, tiny
from tests.chat import corpora
from tests.conftest import REPO

Row = dict[str, Any]


def prepared(corpus: str, **options: Any) -> ChatCorpus:
    return prepare(dataclasses.replace(ChatDataArgs(), corpus=corpus, **options))


def rows_of(corpus: ChatCorpus, split: str) -> list[Row]:
    return [row for _, row in corpus.rows(split)]


def write_lines(path: Path, rows: list[Row]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


# -----------------------------------------------------------------------------
# made


def test_made_is_a_function_of_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_corpus, "MADE_VAL", 20)
    monkeypatch.setattr(chat_corpus, "MADE_TEST", 3)
    found = prepared("made", conversations=50, seed=7)
    assert rows_of(found, "train") == [made.row("train", 7, index) for index in range(50)]
    val = rows_of(found, "val")
    assert len(val) == 20
    assert {row["id"] for row in val}.isdisjoint(row["id"] for row in rows_of(found, "train"))
    test = list(chat_corpus.rows("made", "test"))
    assert test == [row for task in made.TASKS for row in made.examples(task, "test", 3, 7)]
    before = (found.folder / "manifest.json").stat().st_mtime_ns
    again = prepared("made", conversations=50, seed=7)
    assert (again.fingerprint, again.folder) == (found.fingerprint, found.folder)
    assert (again.folder / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="holds a corpus from another source.*seed 7, 50 conversations"):
        prepared("made", conversations=51, seed=7)
    assert prepared("made", conversations=51, seed=7, name="more").name == "more"


# -----------------------------------------------------------------------------
# local


def test_local_files_with_a_part_held_out_by_hash(tmp_path: Path) -> None:
    rows = corpora.random_rows(300, 1)
    path = write_lines(tmp_path / "mine.jsonl", rows)
    found = prepared("local", files=(path,), name="mine")
    train, val = rows_of(found, "train"), rows_of(found, "val")
    assert sorted(row["id"] for row in train + val) == sorted(row["id"] for row in rows)
    assert 3 <= len(val) <= 40
    assert not rows_of(found, "test")
    with pytest.raises(UserError, match="'mine' has no split 'test', only train, val"):
        chat_corpus.rows("mine", "test")
    # The same conversations are held out of a file that has grown, in any order, and repeated ones too.
    more = write_lines(tmp_path / "more.jsonl", corpora.random_rows(50, 2) + rows[::-1] + rows[:100])
    grown = prepared("local", files=(more,), name="grown")
    held = [json.dumps(row["messages"]) for row in rows_of(grown, "val")]
    assert {json.dumps(row["messages"]) for row in val if row != rows[1]} <= set(held)
    assert set(held).isdisjoint(json.dumps(row["messages"]) for row in rows_of(grown, "train"))


@pytest.mark.parametrize(("count", "train"), [(1, 1), (2, 1), (3, 2)])
def test_of_few_conversations_one_is_held_out(count: int, train: int, tmp_path: Path) -> None:
    rows = corpora.random_rows(count, 5)
    found = prepared("local", files=(write_lines(tmp_path / "mine.jsonl", rows),))
    assert len(rows_of(found, "train")) == train
    assert len(rows_of(found, "val")) == count - train


def test_a_validation_file_is_taken_whole(tmp_path: Path) -> None:
    rows = corpora.random_rows(60, 1)
    write_lines(tmp_path / "a.jsonl", rows[:40])
    write_lines(tmp_path / "b.jsonl", rows[40:])
    found = prepared("local", files=(str(tmp_path),), val_file="b.jsonl")
    assert rows_of(found, "train") == rows[:40]
    assert rows_of(found, "val") == rows[40:]
    assert prepared("local").fingerprint == found.fingerprint


def test_what_cannot_be_used_ends_all_or_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad: Row = {"messages": [{"role": "user", "content": "Hi"}]}
    path = write_lines(tmp_path / "mine.jsonl", [*corpora.random_rows(30, 1), bad, bad])
    with pytest.raises(UserError, match="mine.jsonl: line 31: the last message"):
        prepared("local", files=(path,))
    assert not files.data_dir("local").exists()
    found = prepared("local", files=(path,), skip_bad=True)
    assert len(rows_of(found, "train")) + len(rows_of(found, "val")) == 30
    assert "2 conversations were left out. The first: " in capsys.readouterr().out
    with pytest.raises(UserError, match="there is nothing in it"):
        prepared("local", files=(write_lines(tmp_path / "bad.jsonl", [bad]),), name="bad", skip_bad=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"corpus": "ultrachat"}, "expected made, local, smoltalk, .*--corpus local --name ultrachat"),
        (
            {"corpus": "made", "files": ("x.jsonl",)},
            "--files and --val-file go with --corpus local, not made",
        ),
        ({"corpus": "local"}, "name the conversations with --files"),
        ({"corpus": "local", "files": ("absent.jsonl",)}, "no such file or folder"),
    ],
)
def test_arguments_that_do_not_apply_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepared(**options)


# -----------------------------------------------------------------------------
# Kinds


def test_text_is_not_taken_for_conversations_nor_the_reverse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.tiny_corpus(tmp_path)
    corpora.write("chats", corpora.random_rows(5, 1))
    with pytest.raises(UserError, match="corpus 'chats' holds 'conversations', where one of text is needed"):
        Corpus.open("chats")
    with pytest.raises(UserError, match="corpus 'local' holds 'text', where one of conversations is needed"):
        mixture(["local"])
    with pytest.raises(UserError, match="Make it: python -m scripts.chat_data --corpus local --name absent"):
        mixture(["absent"])
    capsys.readouterr()
    for command, name in ((dataset, "local"), (chat_data, "chats")):
        monkeypatch.setattr(sys, "argv", ["command", "--list"])
        command.main()
        assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == [name]
    (files.data_dir("chats") / "manifest.json").write_text("{", "utf-8")
    with pytest.raises(SystemExit, match="2"):
        chat_data.main()


def test_a_damaged_shard_is_noticed() -> None:
    found = corpora.write("chats", corpora.random_rows(50, 1), corpora.random_rows(5, 2))
    path = found.folder / "shard_00000.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        UserError, match="Repair: rm -rf .* scripts.chat_data, as it was made: rows of a test"
    ):
        rows_of(ChatCorpus.open("chats"), "train")
    path.unlink()
    with pytest.raises(UserError, match="the shard is missing"):
        ChatCorpus.open("chats")


# -----------------------------------------------------------------------------
# Mixtures


def test_a_mixture_is_corpora_and_files() -> None:
    for name in ("one", "two", "three"):
        corpora.write(name, corpora.random_rows(5, 1), corpora.random_rows(2, 2))
    path = Path(files.base_dir() / "mix.toml")
    path.write_text(
        '[[source]]\ncorpus = "one"\nepochs = 4\n[[source]]\ncorpus = "two"\nlimit = 3\nsplit = "val"\n'
    )
    found = mixture([str(path), "three"])
    described = [(s.corpus.name, s.split, s.epochs, s.limit) for s in found]
    assert described == [("one", "train", 4, None), ("two", "val", 1, 3), ("three", "train", 1, None)]
    with pytest.raises(UserError, match="corpus 'one' is named twice"):
        mixture([str(path), "one"])
    with pytest.raises(UserError, match="expected a chat corpus"):
        mixture([])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[source]", "not a readable TOML file"),
        ("", "source is missing"),
        ('[[sources]]\ncorpus = "one"', "source is missing"),
        ('source = ["one"]', r"source\[0\] is 'one', expected an object"),
        ("[[source]]\nepochs = 1", r"source\[0\].corpus is missing"),
        ('[[source]]\ncorpus = "one"\nepoch = 1', r"source\[0\] has an unknown key: epoch"),
        ('[[source]]\ncorpus = "one"\nepochs = 0', r"source\[0\].epochs is 0, expected a number from 1"),
        ('[[source]]\ncorpus = "one"\nlimit = "x"', r"source\[0\].limit is 'x', expected a whole number"),
        ('[[source]]\ncorpus = "one"\nlimit = true', r"source\[0\].limit is True, expected a whole number"),
        ('[[source]]\ncorpus = "one"\nsplit = "dev"', "corpus 'one' has no split 'dev', only train"),
        ("[[source]]\ncorpus = 1", r"source\[0\].corpus is 1, expected a text"),
    ],
)
def test_a_mixture_that_is_wrong_is_refused(text: str, message: str, tmp_path: Path) -> None:
    corpora.write("one", corpora.random_rows(5, 1))
    path = tmp_path / "mix.toml"
    path.write_text(text, "utf-8")
    with pytest.raises(UserError, match=message):
        mixture([str(path)])
    with pytest.raises(UserError, match=r"absent.toml: not a readable TOML file"):
        mixture([str(tmp_path / "absent.toml")])


def test_the_mixtures_that_are_shipped_name_corpora_that_can_be_made() -> None:
    for path in REPO.glob("runs/*.toml"):
        with pytest.raises(UserError, match="is not there. Make it: python -m scripts.chat_data") as caught:
            mixture([str(path)])
        assert str(caught.value).rpartition(" ")[2] in (*chat_corpus.HUB_SETS, "made")


# -----------------------------------------------------------------------------
# The hub

QUESTION = {"subject": "", "choices": ["a", "b", "c", "d"], "answer": 2}
THEIRS: dict[str, dict[str, list[Row]]] = {
    "smoltalk": {
        f"data/train-0000{part}-of-00002.parquet": [
            {"messages": row["messages"], "source": "everyday"}
            for row in corpora.random_rows(200, part)
            if all(isinstance(message["content"], str) for message in row["messages"])
        ]
        for part in (0, 1)
    },
    "mmlu": {
        f"all/{split}-00000-of-00001.parquet": [
            {"question": f"{split} {n}", **QUESTION} for n in range(count)
        ]
        for split, count in (("auxiliary_train", 9), ("validation", 3), ("dev", 2), ("test", 4))
    },
    "gsm8k": {
        f"main/{split}-00000-of-00001.parquet": [
            {"question": f"{split} {n}", "answer": f"<<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}"}
            for n in range(count)
        ]
        for split, count in (("train", 90), ("test", 5))
    },
    "humaneval": {
        "openai_humaneval/test-00000-of-00001.parquet": [
            {
                "prompt": "def f():\n",
                "canonical_solution": "    pass\n",
                "test": "def check(f): pass\n",
                "entry_point": "f",
            }
        ]
    },
}
COUNTS = {"mmlu": (9, 5, 4), "humaneval": (0, 0, 1)}


@pytest.fixture
def served(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[hub_server.Hub]:
    """A hub with the data set that the test names."""
    name = request.param
    contents = {"README.md": b"about", "data/other.txt": b"other"}
    for path, rows in THEIRS[name].items():
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "theirs")
        contents[path] = (tmp_path / "theirs").read_bytes()
    server = hub_server.Hub(contents, chat_corpus.HUB_SETS[name].repo)
    for module in ("huggingface_hub.constants", "huggingface_hub.hf_api", "huggingface_hub.file_download"):
        for field in ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE"):
            if hasattr(sys.modules.get(module), field):
                value = (
                    server.url
                    if field == "ENDPOINT"
                    else server.url + "/{repo_id}/resolve/{revision}/{filename}"
                )
                monkeypatch.setattr(sys.modules[module], field, value)
    monkeypatch.setattr(hub.Hub.__init__, "__defaults__", ((0.01,),))
    try:
        yield server
    finally:
        server.close()


@pytest.mark.parametrize(("served", "name"), [(name, name) for name in THEIRS], indirect=["served"])
def test_a_data_set_of_the_hub_becomes_a_corpus(served: hub_server.Hub, name: str) -> None:
    found = prepared(name)
    assert found.source == f"{chat_corpus.HUB_SETS[name].repo}@{hub_server.COMMIT}"
    counts = tuple(len(rows_of(found, split)) for split in chat_corpus.SPLITS)
    theirs = THEIRS[name]
    assert sum(counts) == sum(map(len, theirs.values()))
    if name in COUNTS:
        assert counts == COUNTS[name]
    else:
        assert counts[0] > 10 * counts[1] > 0
        assert counts[2] == sum(len(rows) for path, rows in theirs.items() if "/test-" in path)
    before = served.attempts
    assert prepared(name).fingerprint == found.fingerprint
    assert served.attempts == before, "what is there is not asked for again"
    assert [path.name for path in found.folder.parent.iterdir()] == [name]


@pytest.mark.parametrize("served", ["smoltalk"], indirect=True)
def test_a_download_that_fails_goes_on_with_what_is_missing(served: hub_server.Hub) -> None:
    first, second = THEIRS["smoltalk"]
    served.faults = {second: "wrong bytes"}
    with pytest.raises(UserError, match="00001-of-00002.*the shard is damaged.*run the same command again"):
        prepared("smoltalk")
    assert not files.data_dir("smoltalk").exists()
    served.faults = {}
    asked = served.requests[first]
    assert len(rows_of(prepared("smoltalk"), "train")) > 200
    assert served.requests[first] == asked


@pytest.mark.parametrize("served", ["gsm8k"], indirect=True)
def test_files_that_the_hub_lacks_are_named(served: hub_server.Hub) -> None:
    del served.contents["main/test-00000-of-00001.parquet"]
    with pytest.raises(UserError, match=r"openai/gsm8k: 1 missing: main/test-\*.parquet \(404"):
        prepared("gsm8k")
    served.contents = {"README.md": b"about"}
    with pytest.raises(UserError, match="openai/gsm8k: 1 missing: main"):
        prepared("gsm8k")
