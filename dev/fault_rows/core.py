"""Rows of the CORE tasks: bundles, their download, scores and their comparison."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
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
from nanochat import core_tasks
from nanochat.errors import UserError

def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) / 1024
before, ended = peak(), ""
try:
    bundle = core_tasks.open_bundle(Path(sys.argv[1]))
    for task in core_tasks.load_tasks(bundle):
        core_tasks.load_examples(bundle, task)
except UserError as error:
    ended = str(error)
print(json.dumps([ended, peak() - before]))
"""

# The same of many zips, whose bytes differ in what stdin says; prints those that end in something else.
READ_MANY = """
import json, sys
from pathlib import Path
from nanochat import core_tasks
from nanochat.errors import UserError

def read(path):
    bundle = core_tasks.open_bundle(path)
    return [core_tasks.load_examples(bundle, task) for task in core_tasks.load_tasks(bundle)]

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
from nanochat import core_download
core_download.SHA256 = json.loads(sys.argv.pop(1))
core_download.RETRY_DELAYS_S = (0.1,)
core_download.fetch.__defaults__ = (core_download.BUNDLE_URL, (0.1,))
core_download.main()
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
