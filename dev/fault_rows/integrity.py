"""Rows of the integrity of what is read, of shared disks and of the hub."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from dev.fault_box import TINY, Box, Skip, expect_error, expect_ok, row, wait_until

# Puts shards of another kind in the place of those of the corpus "tiny": parquet as the hub writes it, by its
# compression, or tokens as llm.c does.
MAKE_FOREIGN = """
import sys
import numpy as np, pyarrow as pa, pyarrow.parquet as pq
from nanochat.common import files
from nanochat.data import parquet_shards
from nanochat.data.corpus import Corpus
from nanochat.tokenizer.tokenizer import Tokenizer

kind = sys.argv[1]
old, members = Corpus.open("tiny"), []
tokenizer = Tokenizer.load(files.tokenizer_dir("tiny"))
for shard in old.shards:
    texts = [text for group in range(shard.row_groups) for text in old.read_block(shard, group)]
    path = old.path(shard)
    if kind == "tokens":
        path.unlink()
        path = path.with_suffix(".bin")
        ids = np.array([token for text in texts for token in tokenizer.encode(text, bos=True)], "<u2")
        header = np.array([20240520, 1, len(ids)], "<i4").tobytes().ljust(1024, b"\\0")
        path.write_bytes(header + ids.tobytes())
    else:
        options = {"use_dictionary": False, "write_statistics": False, "compression": kind}
        pq.write_table(pa.table({"text": texts}), path, row_group_size=1024, **options)
    members.append(parquet_shards.describe(path, shard.split))
Corpus(old.folder, "tiny", "karpathy/fineweb-edu-100b-shuffle@x", members).write_manifest(old.folder)
"""

# Draws epochs of a loader while bits of its shard flip, or another file takes its place.
READ_AGAIN = """
import hashlib, random, sys
from nanochat.common import files
from nanochat.data.train_loader import TrainLoader
from nanochat.data.corpus import Corpus
from nanochat.common.errors import UserError
from nanochat.tokenizer.tokenizer import Tokenizer
from nanochat.distributed.world import World

what, count = sys.argv[1], int(sys.argv[2])
corpus, tokenizer = Corpus.open("tiny"), Tokenizer.load(files.tokenizer_dir("tiny"))
loader = TrainLoader(corpus, tokenizer, sequence_len=32, rows_per_batch=64, streams=1, seed=0,
                     world=World.single_process(), device_batch_size=64, threads=1)
start = loader.state_dict()
def epoch():
    loader.load_state_dict(start)
    digest = hashlib.sha256()
    while loader.epoch < 1:
        digest.update(loader.next_batch()[0][0].numpy().tobytes())
    return digest.digest()
right, path = epoch(), corpus.path(corpus.train_shards[0])
good, rng, silent = path.read_bytes(), random.Random(0), []
for i in range(count):
    data = bytearray(good)
    if what == "flip":
        bit = rng.randrange(8 * len(good))
        data[bit // 8] ^= 1 << bit % 8
    else:
        data[1024:-1] = data[1024:-1][::-1] if what == "swap" else open(what, "rb").read()[1024:-1]
    other = path.with_name("other")
    other.write_bytes(data)
    other.replace(path)
    try:
        if epoch() != right:
            silent.append(i)
    except UserError as error:
        assert path.name in str(error) and "Repair: " in str(error), error
    path.write_bytes(good)
    assert epoch() == right
print(len(silent), "silent")
assert not silent, silent
"""


def foreign(box: Box, kind: str) -> None:
    """The tiny corpus with shards as others write them."""
    box.tiny()
    expect_ok(box.python(MAKE_FOREIGN, kind))


@row("T1", "a bit flips in a shard written as the hub's, after its hash was taken", wanted="refused by name")
def t1(box: Box) -> None:
    """Three codecs; none of these files has checksums of its own."""
    box.tiny()
    for kind in ("zstd", "snappy", "none"):
        expect_ok(box.python(MAKE_FOREIGN, kind))
        expect_ok(box.python(READ_AGAIN, "flip", 150))


@row("T2", "the same in a real run, the shard read again in a later epoch", wanted="the run ends, by name")
def t2(box: Box) -> None:
    """Each block is read again in every epoch of so small a corpus."""
    for index, kind in enumerate(("zstd", "snappy")):
        if index:
            shutil.rmtree(box.base / "data")
        foreign(box, kind)
        _, path = started(box, index, f"flip-{kind}")
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
        expect_stopped(box, index, path.name, "have changed", "Repair: python -m scripts.dataset")


def started(box: Box, index: int, run: str) -> tuple[Any, Path]:
    """A trainer that has read every block of its corpus, and the shard that it will read again."""
    process = box.start("base_train", *TINY, "--num-iterations=1000000", f"--run={run}")
    box.wait_for_step(run, 20)
    manifest = json.loads((box.base / "data/tiny/manifest.json").read_text("utf-8"))
    [name] = [shard["name"] for shard in manifest["shards"] if shard["split"] == "train"]
    return process, box.base / "data/tiny" / name


def expect_stopped(box: Box, index: int, *words: str) -> None:
    """The trainer that was started so ends by itself with one line of error."""
    process = box._started[index]
    assert process.wait(180) == 2, box.output(index)[-600:]
    last = box.output(index).strip().splitlines()[-1]
    for word in ("error: ", *words):
        assert word in last, last


@row("T3", "a bit flips in a shard of tokens after its hash was taken", wanted="refused by name")
def t3(box: Box) -> None:
    """Ids below the vocabulary's size look right."""
    foreign(box, "tokens")
    expect_ok(box.python(READ_AGAIN, "flip", 300))


@row("T4", "a shard swapped for another of our own format after opening", wanted="refused by name")
def t4(box: Box) -> None:
    """Its page checksums are right in themselves."""
    box.tiny()
    other = box.folder / "other.jsonl"
    other.write_text("".join(json.dumps({"text": f"other words {i} in a mat"}) + "\n" for i in range(400)))
    expect_ok(box.run("dataset", "--corpus=local", "--name=other", "--files", other))
    _, path = started(box, 0, "swapped")
    (box.base / "data/other" / path.name).replace(path)
    expect_stopped(box, 0, path.name, "it was replaced", "Repair: ")


@row(
    "T5", "a shard of tokens, and parquet as the hub's, swapped for one of its size", wanted="refused by name"
)
def t5(box: Box) -> None:
    """The size of the file stays the same."""
    for kind in ("tokens", "none"):
        foreign(box, kind)
        expect_ok(box.python(READ_AGAIN, "swap", 2))
        shutil.rmtree(box.base / "data")


@row("T71", "another machine's live download and corpus in the making on a shared disk", wanted="kept")
def t71(box: Box) -> None:
    """Their process ids do not live here; also as earlier releases named them."""
    box.tiny()
    data = box.base / "data"
    kept = [data / ".tmp-big@0123abcd.4194301", data / "fineweb-edu/.tmp-fetch@0123abcd.4194301"]
    kept += [data / ".tmp-older.4194301", data / "fineweb-edu/.tmp-fetch.4194301"]
    for folder in kept:
        folder.mkdir(parents=True)
        (folder / "half").touch()
    text = box.folder / "x.txt"
    text.write_text("some words in a text.\n\n" * 2000)
    expect_ok(box.run("dataset", "--corpus=local", "--name=mine", "--files", text))
    box.run("dataset", "--corpus=fineweb-edu", "-n", "1", env={"HF_HUB_OFFLINE": "1"})
    assert all((folder / "half").exists() for folder in kept), [str(folder) for folder in kept]


OPEN = """
import sys, time
from nanochat.data.corpus import Corpus
Corpus.open(sys.argv[1])
"""


def half_there(box: Box) -> Path:
    """A corpus of the hub whose training shard has not arrived; returns its folder."""
    foreign(box, "zstd")
    folder = box.base / "data/fineweb-edu"
    (box.base / "data/tiny").rename(folder)
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    for shard in manifest["shards"]:
        if shard["split"] == "train":
            (folder / shard["name"]).unlink()
    return folder


@row("T72", "the clock of the file server is behind, or ours was set back", wanted="the live one is seen")
def t72(box: Box) -> None:
    """The clock that dates the files is asked."""
    folder = half_there(box)
    stage = folder / ".tmp-fetch@0123abcd.4194301"
    stage.mkdir()
    code = "import time; true = time.time; time.time = lambda: true() + float(sys.argv[2])\n"
    for wrong_s in (86_400, -120, 120):
        os.utime(stage)  # it is renewed
        done = box.python(OPEN.replace("from nano", f"{code}from nano", 1), "fineweb-edu", wrong_s)
        expect_ok(done)
        assert "on their way" in done.stdout, done.stdout


@row("B31", "a dead download's folder with a time in the future", wanted="not waited for")
def b31(box: Box) -> None:
    """It was left by a machine whose clock was a day ahead."""
    folder = half_there(box)
    stage = folder / ".tmp-fetch.4194301"
    stage.mkdir()
    future = stage.stat().st_mtime + 86_400
    os.utime(stage, (future, future))
    flags = [flag for flag in TINY if not flag.startswith("--corpus")]
    shutil.move(box.base / "tokenizers/tiny", box.base / "tokenizers/fineweb-edu")
    done = box.run("base_train", *flags, "--corpus=fineweb-edu", "--num-iterations=2", "--run=r", timeout=120)
    expect_error(done, "shard_00000.parquet", "the shard is missing", "Repair: ")


@row("T78", "a manifest claims 30,000,000 row groups", wanted="refused by name before memory is spent")
def t78(box: Box) -> None:
    """Whoever plans an epoch would list them all."""
    box.tiny()
    path = box.base / "data/tiny/manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    for claimed in (30_000_000, 5_000):
        manifest["shards"][0]["row_groups"] = claimed
        path.write_text(json.dumps(manifest))
        done = box.run("base_train", *TINY, "--num-iterations=2", "--run=r")
        expect_error(done, "manifest.json", f"{claimed} row groups in")


@row("T79", "null columns, all null, thousands of row groups, a row of 200 MB", wanted="refused or read")
def t79(box: Box) -> None:
    """Files of a person's own."""
    code = """
import sys
import pyarrow as pa, pyarrow.parquet as pq
options = {"use_dictionary": False, "compression": "zstd"}
texts = {"nulls": pa.nulls(50), "all-null": pa.array([None] * 50, pa.string()),
         "groups": pa.array([f"document {i}" for i in range(3000)]),
         "long": pa.array(["word " * (40 << 20), "a", "b"])}
for name, column in texts.items():
    rows = 1 if name == "groups" else 1000
    pq.write_table(pa.table({"text": column}), f"{name}.parquet", row_group_size=rows, **options)
"""
    expect_ok(box.python(code))
    for name in ("nulls", "all-null"):
        expect_error(box.run("dataset", "--corpus=local", f"--name={name}", f"--files={name}.parquet"))
    expect_ok(box.run("dataset", "--corpus=local", "--name=groups", "--files=groups.parquet"))
    done = box.run("dataset", "--corpus=local", "--name=long", "--files=long.parquet")
    assert done.returncode in (0, 2), done.stderr[-600:]
    assert "Traceback" not in done.stderr


@row("T96", "row_groups changed in the manifest", wanted="refused at the first use of the shard")
def t96(box: Box) -> None:
    """The fingerprint does not tell."""
    box.tiny()
    path = box.base / "data/tiny/manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    manifest["shards"][0]["row_groups"] += 1
    path.write_text(json.dumps(manifest))
    done = box.run("base_train", *TINY, "--num-iterations=2", "--run=r")
    expect_error(done, "shard_00000.parquet", "row groups, expected", "Repair: ")


@row("T98", "python -O, and a shard that was swapped for a smaller one", wanted="refused by name")
def t98(box: Box) -> None:
    """Without asserts."""
    box.tiny()
    code = """
import sys
from pathlib import Path
from nanochat.data import parquet_shards, token_shards
from nanochat.common.checksums import ChecksummedFile
from nanochat.data.corpus import Corpus
from nanochat.common.errors import cli

corpus = Corpus.open("tiny")
source = ChecksummedFile(corpus.path(corpus.train_shards[0]))
reads = {"text": lambda: parquet_shards.read_column(source, 7),
         "ids": lambda: token_shards.read_rows(source, 10**6, 33, 300)}
cli(reads[sys.argv[1]])()
"""
    for what in ("text", "ids"):
        done = box.execute([sys.executable, "-O", "-c", code, what])
        expect_error(done, "shard_00000.parquet", "was asked for")


@row("T100", "eight makers of one corpus at once", wanted="all of them find it whole")
def t100(box: Box) -> None:
    """The README's command, typed eight times."""
    text = box.folder / "x.jsonl"
    text.write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(3000)))
    makers = [box.start("dataset", "--corpus=local", "--name=one", "--files", text) for _ in range(8)]
    for index, maker in enumerate(makers):
        assert maker.wait(200) == 0, box.output(index)
        assert "one: 2970 documents" in box.output(index) or "documents in 1 training shards" in box.output(
            index
        )
    assert [path.name for path in (box.base / "data").iterdir()] == ["one"]
    expect_ok(box.run("dataset", "--corpus=one", "--verify"))


@row("T102", "a run ends while blocks are on their way", wanted="exit code 0")
def t102(box: Box) -> None:
    """Threads tokenize ahead when the run ends."""
    box.tiny()
    for number in range(2):
        expect_ok(box.run("base_train", *TINY, "--num-iterations=1", f"--run=r{number}"))


# A maker that stops in the middle, until it is told to go on.
SLOW_MAKER = """
import sys, time
from pathlib import Path
from nanochat.data import parquet_shards

write = parquet_shards.write_shards
def slow(*arguments):
    made = write(*arguments)
    Path("in-the-middle").touch()
    while not Path("go-on").exists():
        time.sleep(0.05)
    return made
parquet_shards.write_shards = slow
from scripts.dataset import main
main()
"""


@row("A37", "two containers share the base directory and make corpora at once", wanted="both are made")
def a37(box: Box) -> None:
    """Each sees process ids of its own."""
    own_pids = ["unshare", "-pf", "--mount-proc"]
    if shutil.which("unshare") is None or box.execute([*own_pids, "true"]).returncode:
        raise Skip("no pid namespaces can be made here")
    text = box.folder / "x.jsonl"
    text.write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(3000)))
    make = ["--corpus", "local", "--files", str(text), "--name"]
    outcome: list[Any] = []
    first = threading.Thread(
        target=lambda: outcome.append(
            box.execute([*own_pids, sys.executable, "-c", SLOW_MAKER, *make, "big"])
        )
    )
    first.start()
    try:
        wait_until((box.folder / "in-the-middle").exists, 60, "the first maker did not begin")
        expect_ok(box.execute([*own_pids, *box.argv("dataset", *make, "other")]))
    finally:
        (box.folder / "go-on").touch()
        first.join()
    expect_ok(outcome[0])
    assert sorted(path.name for path in (box.base / "data").iterdir()) == ["big", "other"]


@row(
    "D25", "the corpus's folder is replaced while training", wanted="the same text: goes on; another: by name"
)
def d25(box: Box) -> None:
    """A corpus that is made again has the same bytes."""
    box.tiny()
    folder = box.base / "data/tiny"
    process, path = started(box, 0, "replaced")
    shutil.copytree(folder, box.base / "data/again")
    folder.rename(box.base / "data/before")
    (box.base / "data/again").rename(folder)
    metrics = box.base / "runs/replaced/metrics.jsonl"
    after = metrics.read_bytes().count(b"\n") + 400  # several epochs of it
    box.wait_for_step("replaced", after, timeout=240)
    assert process.poll() is None, box.output(0)
    path.write_bytes(path.read_bytes()[::-1])
    expect_stopped(box, 0, path.name, "Repair: ")


# -----------------------------------------------------------------------------
# The hub


@contextlib.contextmanager
def server(status: int, headers: dict[str, str], body: bytes) -> Iterator[str]:
    """The address of a server that answers everything the same."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *arguments: object) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{running.server_address[1]}"
    finally:
        running.shutdown()
        running.server_close()


def fetched(box: Box, url: str, **env: str) -> str:
    """The error of a download from there; it must come at once, not after 80 s of further attempts."""
    env = {"HF_ENDPOINT": url, "HF_HOME": str(box.folder / "hf"), "NO_PROXY": "127.0.0.1"} | env
    done = box.run("dataset", "--corpus=fineweb-edu", "-n", "1", env=env, timeout=70)
    assert "again in" not in done.stdout, done.stdout
    return expect_error(done)


@row("B32", "HF_HUB_OFFLINE=1", wanted="said at once")
def b32(box: Box) -> None:
    """A setting does not change within a minute."""
    assert "HF_HUB_OFFLINE" in fetched(box, "http://127.0.0.1:9", HF_HUB_OFFLINE="1")


@row(
    "B33", "401 of a wrong HF_TOKEN, the page of a captive portal, 403, 404", wanted="said at once, with why"
)
def b33(box: Box) -> None:
    """Neither does a token, a portal or a wrong name."""
    page = {"Content-Type": "text/html"}
    answers: list[tuple[int, dict[str, str], bytes, str]] = [
        (401, {"X-Error-Message": "Invalid credentials"}, b"", "HF_TOKEN"),
        (403, {}, b"", "HF_TOKEN"),
        (200, page, b"<html>Please sign in</html>", "HF_ENDPOINT"),
        (302, {"Location": "http://127.0.0.1:9/login"}, b"", "HF_ENDPOINT"),
        (404, {"X-Error-Code": "EntryNotFound"}, b"", "404"),
        (404, page, b"<html>no such page</html>", "404"),
    ]
    for status, headers, body, word in answers:
        with server(status, headers, body) as url:
            told = fetched(box, url, HF_TOKEN="hf_wrong")
        assert word in told, told


@row("B34", "429 with Retry-After", wanted="waits and goes on")
def b34(box: Box) -> None:
    """This one does pass."""
    from tests.hub_server import environment, numbered, running

    with running(box.folder, numbered(1), documents=50) as hub:
        hub.faults = dict.fromkeys(hub.contents, "429 with Retry-After")
        hub.times = dict.fromkeys(hub.contents, 1)
        env = environment(hub, box.base)
        expect_ok(box.run("dataset", "--corpus=fineweb-edu", "-n", "1", env=env))
        assert set(hub.times.values()) == {0}
