"""Rows of the CORE tasks: bundles, their download, scores and their comparison."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import random
import shutil
import struct
import subprocess
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from dev.fault_box import TINY, Box, expect_error, expect_ok, row

TEXTS = {
    "core.yaml": "icl_tasks: [{label: pets, dataset_uri: pets, num_fewshot: 1, icl_task_type: schema}]",
    "eval_meta_data.csv": "Eval Task,Random baseline\npets,50\n",
    "eval_data/pets": '{"context_options": ["the cat", "a mat"], "continuation": "sat", "gold": 0}\n' * 6,
}

# Reads a bundle as base_eval does before it scores, and says how that ended and what memory it took.
READ = """
import json, sys
from pathlib import Path
from nanochat.evaluation.core import bundle as core_bundle
from nanochat.common.errors import UserError

def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) / 1024
before, ended = peak(), ""
try:
    bundle = core_bundle.open_bundle(Path(sys.argv[1]))
    for task in core_bundle.load_tasks(bundle):
        core_bundle.load_examples(bundle, task)
except UserError as error:
    ended = str(error)
print(json.dumps([ended, peak() - before]))
"""

# The same of many zips, whose bytes differ in what stdin says; prints those that end in something else.
READ_MANY = """
import json, sys
from pathlib import Path
from nanochat.evaluation.core import bundle as core_bundle
from nanochat.common.errors import UserError

def read(path):
    bundle = core_bundle.open_bundle(path)
    return [core_bundle.load_examples(bundle, task) for task in core_bundle.load_tasks(bundle)]

path, data = Path("x.zip"), Path("good.zip").read_bytes()
right = read(Path("good.zip"))
for changes in json.load(sys.stdin):
    damaged = bytearray(data)
    for at, byte in changes:
        damaged[at] = byte
    path.write_bytes(damaged)
    try:
        if read(path) != right:
            print("read as other tasks", changes)
    except UserError:
        pass
    except BaseException as error:
        print(repr(error), changes)
"""


def zipped(texts: dict[str, str | bytes]) -> bytes:
    """A bundle as a zip file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in texts.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def claiming(data: bytes, name: bytes, size: int) -> bytes:
    """A zip whose two headers claim that a member has `size` bytes."""
    patched = bytearray(data)
    struct.pack_into("<I", patched, data.index(name) - 30 + 22, size)
    struct.pack_into("<I", patched, data.rindex(name) - 46 + 24, size)
    return bytes(patched)


@row(
    "Z1", "an eval bundle of 0.6 MB that unpacks to 600 MB, its header true or a lie", wanted="10 MB at most"
)
def z1(box: Box) -> None:
    """The door of base_eval, then the command itself."""
    box.tiny()
    expect_ok(box.run("base_train", *tiny_run("one")))
    bomb, path = zipped(TEXTS | {"eval_data/pets": bytes(600 << 20)}), box.folder / "x.zip"
    for claimed in (600 << 20, 100, 1_900_000, 60_000_000):
        path.write_bytes(claiming(bomb, b"eval_data/pets", claimed))
        done = box.python(READ, path)
        expect_ok(done)
        ended, mib = json.loads(done.stdout)
        assert "x.zip" in ended, f"claims {claimed}: {ended or 'read'}"
        assert mib <= 10, f"claims {claimed}: {mib:.0f} MiB"
    flags = ("--run=one", "--eval=core", "--device-type=cpu", "--dtype=float32")
    expect_error(box.run("base_eval", *flags, f"--eval-bundle={path}"), "x.zip")


@row("Z2", "2,000 eval bundles with one to three bytes changed", wanted="read right, or refused by name")
def z2(box: Box) -> None:
    """Half of the changes are in headers and directory."""
    data = zipped(TEXTS)
    (box.folder / "good.zip").write_bytes(data)
    rng = random.Random(1)
    directory = data.index(b"PK\x01\x02")
    changes = [
        [
            (rng.randrange(*rng.choice([(0, len(data)), (directory, len(data))])), rng.randrange(256))
            for _ in range(rng.randrange(1, 4))
        ]
        for _ in range(2000)
    ]
    done = box.python(READ_MANY, input=json.dumps(changes), cwd=box.folder)
    expect_ok(done)
    assert not done.stdout, f"{len(done.stdout.splitlines())} of 2000: {done.stdout.splitlines()[0]}"


def tiny_run(name: str, steps: int = 2) -> list[str]:
    """Flags of a run of a few steps."""
    return [*TINY, f"--run={name}", f"--num-iterations={steps}", "--eval-every=0"]


# core_download with the hashes of what is served here.
FETCH = """
import json, sys
from nanochat.evaluation.core import download as core_download
hashes = json.loads(sys.argv.pop(1))
core_download.public_files = lambda: hashes
core_download.RETRY_DELAYS_S = (0.1,)
core_download.fetch.__defaults__ = (core_download.BUNDLE_URL, (0.1,))
from scripts.core_download import main
main()
"""
HASHES = json.dumps({name: hashlib.sha256(text.encode()).hexdigest() for name, text in TEXTS.items()})
Answer = Callable[[BaseHTTPRequestHandler], None]


@contextlib.contextmanager
def served(answer: Answer) -> Iterator[str]:
    """A server of this machine that answers so; its address."""
    handler = type("Handler", (BaseHTTPRequestHandler,), {"do_GET": answer, "log_message": lambda *_: None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/x.zip"
    finally:
        server.shutdown()
        server.server_close()


def slowly(handler: BaseHTTPRequestHandler) -> None:
    """The zip in twenty pieces over a second."""
    data = zipped(TEXTS)
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    for at in range(0, len(data), piece := len(data) // 20 + 1):
        handler.wfile.write(data[at : at + piece])
        time.sleep(0.05)


def fetched(box: Box, url: str) -> subprocess.CompletedProcess[str]:
    """core_download of an address, to its end."""
    return box.python(FETCH, HASHES, f"--url={url}", env={"NO_PROXY": "127.0.0.1"})


def expect_bundle(box: Box) -> None:
    """All files of the bundle, and nothing beside its folder."""
    folder = box.base / "eval_bundle"
    found = {
        path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()
    }
    assert found == TEXTS
    assert [path.name for path in box.base.iterdir()] == ["eval_bundle"]


@row("T73", "three core_download at once", wanted="one fetches, the others find the folder; each ends with 0")
def t73(box: Box) -> None:
    """Over a slow network."""
    with served(slowly) as url, ThreadPoolExecutor(3) as pool:
        for done in pool.map(lambda _: fetched(box, url), range(3)):
            expect_ok(done)
    expect_bundle(box)


def _headers(
    handler: BaseHTTPRequestHandler, status: int, *headers: tuple[str, str], data: bytes = b""
) -> None:
    handler.send_response(status)
    for name, value in headers:
        handler.send_header(name, value)
    handler.send_header("Connection", "close")
    handler.end_headers()
    with contextlib.suppress(OSError):
        handler.wfile.write(data)
    handler.close_connection = True


@row(
    "T74",
    "a proxy: HTML, truncation, wrong range, no length, lengths that are none, a redirect to a file",
    wanted="whole, or says why",
)
def t74(box: Box) -> None:
    """Each is followed by a good answer where it fails."""
    data = zipped(TEXTS)
    page = b"<html>please log in</html>"
    bad: dict[str, Answer] = {
        "HTML": lambda h: _headers(h, 200, ("Content-Length", str(len(page))), data=page),
        "truncated": lambda h: _headers(h, 200, ("Content-Length", str(len(data))), data=data[:100]),
        "a range that nobody asked for": lambda h: _headers(
            h, 206, ("Content-Length", "9"), data=data[50:59]
        ),
        "10^15 bytes": lambda h: _headers(h, 200, ("Content-Length", "1" + "0" * 15), data=data),
        "a file": lambda h: _headers(h, 302, ("Location", "file:///etc/passwd")),
        "no address": lambda h: _headers(h, 302, ("Location", "http://[")),
    }
    good = {
        length: (lambda h, length=length: _headers(h, 200, ("Content-Length", length), data=data))
        for length in ("-5", "1e9", "9" * 5000, "")
    }
    for name, answer in bad.items():
        with served(answer) as url:
            expect_error(fetched(box, url))
        assert not (box.base / "eval_bundle").exists(), name
        for path in box.base.iterdir():  # what has arrived is kept for the next
            path.unlink()
    for answer in good.values():
        with served(answer) as url:
            expect_ok(fetched(box, url))
        expect_bundle(box)
        shutil.rmtree(box.base / "eval_bundle")


@row("T76", "eval_bundle.zip.part is a link to a file of mine", wanted="my file is as it was")
def t76(box: Box) -> None:
    """By name and by content."""
    mine, part = box.folder / "mine", box.base / "eval_bundle.zip.part"
    for make in (part.symlink_to, part.hardlink_to):
        mine.write_text("my text")
        make(mine)
        with served(slowly) as url:
            expect_ok(fetched(box, url))
        expect_bundle(box)
        assert mine.read_text() == "my text"
        shutil.rmtree(box.base / "eval_bundle")


@row("E19", "core_download from a dead address, a path, file://, and no address", wanted="one line each")
def e19(box: Box) -> None:
    """Nothing is left of any."""
    for url in (
        "http://127.0.0.1:9/x.zip",
        "/tmp/x.zip",
        "file:///tmp/x.zip",
        "http://[",
        "http://host:port/",
    ):
        expect_error(fetched(box, url), url)
    assert list(box.base.iterdir()) == []


EVAL = ("--device-type=cpu", "--dtype=float32", "--eval-tokens=512", "--max-new-tokens=2")


def scored_run(box: Box, bundle: bytes = zipped(TEXTS), name: str = "one") -> tuple[str, ...]:
    """A run that has a checkpoint, and the flags that score it with CORE on a bundle."""
    if not (box.base / "data").exists():
        box.tiny()
    expect_ok(box.run("base_train", *tiny_run(name)))
    (box.folder / "b.zip").write_bytes(bundle)
    return (f"--run={name}", *EVAL, f"--eval-bundle={box.folder / 'b.zip'}")


def scores_of(box: Box, name: str = "one") -> dict[str, Any]:
    """base_eval.json of a run."""
    found: dict[str, Any] = json.loads((box.base / "runs" / name / "base_eval.json").read_text())
    return found


@row("E6", "base_eval --eval sample after a run was scored", wanted="what was not asked for stays")
def e6(box: Box) -> None:
    """The other parts one by one, too."""
    flags = scored_run(box)
    expect_ok(box.run("base_eval", *flags, "--eval=core"))
    whole = scores_of(box)
    for part in ("sample", "bpb"):
        expect_ok(box.run("base_eval", *flags, f"--eval={part}"))
        for name in ("core_metric", "tasks", "bundle"):
            assert scores_of(box)[name] == whole[name], (part, name)
    assert len(scores_of(box)["samples"]) == 6
    assert scores_of(box)["bpb"]["val"] > 0


@row("E9", "numbers of base_eval that no scoring can use", wanted="one line each, before anything is loaded")
def e9(box: Box) -> None:
    """Those that were tried, and others."""
    for flag in (
        "--core-metric-max-per-task=-3",
        "--eval-batch-tokens=-5",
        "--eval-tokens=-7",
        "--eval-tokens=0",
        "--device-batch-size=0",
        "--max-new-tokens=-1",
        "--core-crop-tokens=1",
        "--step=-1",
        "--dist-timeout=nan",
    ):
        expect_error(box.run("base_eval", "--run=one", flag), flag.partition("=")[0])


@row(
    "E10",
    "base_eval without its corpus, tokenizer, step or runs",
    wanted="one line each, before CORE is scored",
)
def e10(box: Box) -> None:
    """Each thing is put back for the next."""
    flags = scored_run(box)
    for name in ("data/tiny", "tokenizers/tiny"):
        place = box.base / name
        place.rename(box.folder / "aside")
        done = box.run("base_eval", *flags)
        expect_error(done)
        assert "CORE" not in done.stdout, done.stdout
        (box.folder / "aside").rename(place)
    expect_error(box.run("base_eval", *flags, "--step=99"), "99")
    for words in (
        ["--compare", "one"],
        ["--compare", "one", "absent"],
        ["--combine", "one"],
        ["--combine", "one", "one"],
    ):
        expect_error(box.run("base_eval", *words))


@row("T54", "base_eval killed between the answers and the scores", wanted="--compare refuses the mismatch")
def t54(box: Box) -> None:
    """The answers of a second scoring beside the scores of the first."""
    flags = scored_run(box)
    expect_ok(box.run("base_eval", *flags, "--eval=core"))
    shutil.copytree(box.base / "runs" / "one", box.base / "runs" / "two")
    expect_ok(box.run("base_eval", "--compare", "one", "two"))
    stop = """
import os, sys
from nanochat.common import files
write = files.write_json
files.write_json = lambda path, value: os._exit(9) if path.name == "base_eval.json" else write(path, value)
from scripts import base_eval
base_eval.main()
"""
    done = box.python(stop, *flags, "--eval=core", "--core-metric-max-per-task=4")
    assert done.returncode == 9, done.stderr[-300:]
    line = expect_error(
        box.run("base_eval", "--compare", "two", "one"), "core_predictions.jsonl", "not the answers"
    )
    assert "--run one --eval core" in line
    expect_ok(box.run("base_eval", *flags, "--eval=core"))  # the remedy
    expect_ok(box.run("base_eval", "--compare", "two", "one"))


@row(
    "T55",
    "the questions change under one name between two scorings",
    wanted="--compare refuses, the task is named",
)
def t55(box: Box) -> None:
    """One question of six."""
    flags = scored_run(box)
    expect_ok(box.run("base_eval", *flags, "--eval=core"))
    shutil.copytree(box.base / "runs" / "one", box.base / "runs" / "two")
    other = TEXTS | {"eval_data/pets": TEXTS["eval_data/pets"].replace("a mat", "a rug", 1)}
    (box.folder / "b.zip").write_bytes(zipped(other))
    expect_ok(box.run("base_eval", *flags, "--eval=core"))
    expect_error(box.run("base_eval", "--compare", "two", "one"), "sha256 of pets")
    expect_error(box.run("base_eval", "--combine", "two", "one"), "sha256 of pets")


@row(
    "T80",
    "eval bundles with YAML aliases and depth, a pipe, a link, NUL, 200,000 options, a long query",
    wanted="refused or scored",
)
def t80(box: Box) -> None:
    """As they are read before the first example is scored; none takes long."""
    task = "{label: pets, dataset_uri: pets, num_fewshot: 1, icl_task_type: schema}"
    laughs = "a0: &a0 [x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 30)
    )
    many = json.dumps({"context_options": ["a"] * 200_000, "continuation": "b", "gold": 0})
    for name, text in (
        ("core.yaml", f"{laughs}icl_tasks: [{{label: pets, icl_task_type: *a29}}]"),
        ("core.yaml", "[" * 3_000),
        ("core.yaml", f"icl_tasks: [{task}]\0"),
        ("core.yaml", "icl_tasks: [" + "9" * 5000 + "]"),
        ("eval_data/pets", many + "\n"),
        (
            "eval_data/pets",
            json.dumps({"context_options": ["a" * 6_000_000], "continuation": "b", "gold": 0}),
        ),
        ("eval_data/pets", "[" * 100_000),
    ):
        (box.folder / "x.zip").write_bytes(zipped(TEXTS | {name: text}))
        expect_ok(box.python(READ, box.folder / "x.zip", timeout=100))
    pipe = box.folder / "pipe.zip"
    os.mkfifo(pipe)
    expect_ok(box.python(READ, pipe, timeout=60))


@row(
    "T90",
    "a full disk under the answers, the scores",
    wanted="nothing computed is lost; one line",
)
def t90(box: Box) -> None:
    """The calls fail as on a full disk; what was found is on the console in each case."""
    flags = scored_run(box)
    for name in ("core_predictions.jsonl", "base_eval.json"):
        env = box.faulty("write", name, errno.ENOSPC)
        done = box.run("base_eval", *flags, env=env)
        assert "CORE 1.0000" in done.stdout or "CORE -" in done.stdout or "CORE 0" in done.stdout, done.stdout
        assert "bits per byte, val" in done.stdout
        expect_error(done, name, "No space left", "printed above")
    expect_ok(box.run("base_eval", *flags))
