"""A hub on this machine that speaks what huggingface_hub needs, and misbehaves on demand."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from nanochat.data import parquet_shards
from nanochat.data.hub_corpora import HUB_CORPORA

REPO = HUB_CORPORA["fineweb-edu"].repo
COMMIT = "0123456789abcdef0123456789abcdef01234567"
VAL = HUB_CORPORA["fineweb-edu"].val_shard

# The command a user types, but with short waits before another attempt.
COMMAND = (
    "import sys; from nanochat.data import hub\n"
    "hub.Hub.__init__.__defaults__ = ([float(x) for x in sys.argv.pop(1).split(',')],)\n"
    "from scripts.dataset import main; main()"
)


class Hub:
    """A hub with one data set, and perhaps files of a model.

    Attributes:
        contents: the files of the data set.
        repo: its name.
        model_files: path of a file of a model, such as openai-community/gpt2/vocab.json -> what it holds.
        faults: name of a file -> how a GET of it goes wrong.
        times: name of a file -> how often it goes wrong before it goes right; not listed: always.
        requests: GETs of each whole file, without those of a range.
        ranges: GETs of a range of each file.
        lists: how many files each request for sizes and digests has named.
        attempts: requests of any kind.
        tokens: what the clients gave as authorization.
        refusal: status and headers of the answer to everything, where the hub refuses all.
        chunk_s: seconds between the pieces (a tenth each) of an answer.
    """

    def __init__(self, contents: dict[str, bytes], repo: str = REPO) -> None:
        self.contents = contents
        self.repo = repo
        self.model_files: dict[str, bytes] = {}
        self.faults: dict[str, str] = {}
        self.times: dict[str, int] = {}
        self.requests: Counter[str] = Counter()
        self.ranges: Counter[str] = Counter()
        self.tokens: set[str | None] = set()
        self.refusal: tuple[int, dict[str, str]] | None = None
        self.attempts = 0
        self.lists: list[int] = []
        self.chunk_s = 0.0
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def fault_of(self, name: str) -> str:
        """How this answer goes wrong, "" if it does not; counts down."""
        if not (fault := self.faults.get(name, "")) or self.times.get(name, 1) == 0:
            return ""
        if name in self.times:
            self.times[name] -= 1
        return fault

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(send_body=False)

    def do_GET(self) -> None:
        with contextlib.suppress(ConnectionError):
            self.answer(send_body=True)

    def do_POST(self) -> None:
        """Sizes and digests of the files that a form names; those that are absent are passed over."""
        form = urllib.parse.parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        self.hub.attempts += 1
        if self.hub.refusal:
            self.reply(*self.hub.refusal, b"<html>Please sign in</html>")
            return
        self.hub.tokens.add(self.headers["Authorization"])
        self.hub.lists.append(len(form["paths"]))
        assert self.path == f"/api/datasets/{self.hub.repo}/paths-info/{COMMIT}"
        there = {name: self.hub.contents[name] for name in form["paths"] if name in self.hub.contents}
        entries = [entry_of(name, data) for name, data in there.items()]
        self.reply(200, {"Content-Type": "application/json"}, json.dumps(entries).encode())

    def answer(self, send_body: bool) -> None:
        name = self.name()
        self.hub.attempts += 1
        if self.hub.refusal:
            self.reply(*self.hub.refusal, b"<html>Please sign in</html>")
            return
        tree = f"/api/datasets/{self.hub.repo}/tree/{COMMIT}/"
        if self.path.startswith(tree):
            folder = self.path.removeprefix(tree).partition("?")[0]
            there = {at: data for at, data in self.hub.contents.items() if at.rpartition("/")[0] == folder}
            status = 200 if there else 404
            entries = json.dumps([entry_of(at, data) for at, data in there.items()]).encode()
            self.reply(status, {"Content-Type": "application/json"}, entries)
            return
        data = self.find(name)
        if data is None:
            self.reply(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b"")
            return
        self.hub.tokens.add(self.headers["Authorization"])
        headers = {
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Linked-Size": str(len(data)),
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        if not send_body:
            self.reply(200, headers, data, send_body=False)
            return
        wanted = self.headers["Range"]
        (self.hub.ranges if wanted else self.hub.requests)[name] += 1
        # The footer is asked for first; faults are of the transfer that follows.
        is_footer = bool(wanted) and self.hub.requests[name] == 0
        fault = "" if is_footer else self.hub.fault_of(name)
        if fault in FAULTS:
            FAULTS[fault](self, headers, data)
        else:
            self.whole(headers, data)

    def name(self) -> str:
        """The file that the path names, in the folders of the data set; or its last part."""
        path = self.path.partition("?")[0]
        for revision in ("main", COMMIT):
            if path.startswith(prefix := f"/datasets/{self.hub.repo}/resolve/{revision}/"):
                return path.removeprefix(prefix)
        return path.rpartition("/")[2]

    def find(self, name: str) -> bytes | None:
        """What the path that is asked for holds."""
        expected = [f"/datasets/{self.hub.repo}/resolve/{revision}/{name}" for revision in ("main", COMMIT)]
        if self.path in [*expected, f"/elsewhere/{name}"] and name in self.hub.contents:
            return self.hub.contents[name]
        return self.hub.model_files.get(self.path.removeprefix("/").replace("/resolve/main/", "/"))

    def whole(self, headers: dict[str, str], data: bytes) -> None:
        if wanted := self.headers["Range"]:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            end = int(last) + 1 if last else len(data)
            headers = {**headers, "Content-Range": f"bytes {first}-{end - 1}/{len(data)}"}
            self.reply(206, headers, data[int(first) : end])
        else:
            self.reply(200, headers, data)

    def reply(
        self,
        status: int,
        headers: dict[str, str],
        data: bytes,
        send_body: bool = True,
        length: int | None = None,
    ) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        if not send_body or self.command == "HEAD":
            return
        if not self.hub.chunk_s:
            self.wfile.write(data)
            return
        for at in range(0, len(data), piece := max(1, len(data) // 10)):
            self.wfile.write(data[at : at + piece])
            self.wfile.flush()
            time.sleep(self.hub.chunk_s)


def entry_of(name: str, data: bytes) -> dict[str, object]:
    """A file as the hub lists it."""
    digest = hashlib.sha256(data).hexdigest()
    lfs = {"oid": digest, "size": len(data), "pointerSize": 134}
    return {"type": "file", "path": name, "size": len(data), "oid": "0" * 40, "lfs": lfs}


Answer = Callable[[_Handler, dict[str, str], bytes], None]


def _reset(handler: _Handler, headers: dict[str, str], data: bytes) -> None:
    handler.reply(200, headers, data[: len(data) // 2], length=len(data))
    handler.wfile.flush()
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True


def _closed_early(handler: _Handler, headers: dict[str, str], data: bytes) -> None:
    handler.reply(200, headers, data[: len(data) // 3], length=len(data))
    handler.close_connection = True


def _stall(handler: _Handler, headers: dict[str, str], data: bytes) -> None:
    handler.reply(200, headers, data[: len(data) // 2], length=len(data))
    handler.wfile.flush()
    time.sleep(4)  # the client waits 1 s
    handler.close_connection = True


def _short_length(handler: _Handler, headers: dict[str, str], data: bytes) -> None:
    handler.reply(200, headers, data[:-100])


def _long_length(handler: _Handler, headers: dict[str, str], data: bytes) -> None:
    handler.reply(200, headers, data, length=len(data) + 100)
    handler.close_connection = True


def _html(handler: _Handler, headers: dict[str, str], data: bytes) -> None:
    handler.reply(200, {"Content-Type": "text/html"}, b"<html><body>Please sign in</body></html>")


def _html_of_the_size(handler: _Handler, headers: dict[str, str], data: bytes) -> None:
    handler.reply(200, headers, b"<html>".ljust(len(data)))


def _wrong_bytes(handler: _Handler, headers: dict[str, str], data: bytes) -> None:
    handler.whole(headers, bytes([data[0] ^ 1]) + data[1:])


def _too_many(handler: _Handler, headers: dict[str, str], data: bytes) -> None:
    handler.reply(429, {"Retry-After": "1"}, b"slow down")


def _redirect(handler: _Handler, headers: dict[str, str], data: bytes) -> None:
    if handler.path.startswith("/elsewhere/"):
        handler.whole(headers, data)
    else:
        handler.reply(302, {"Location": f"/elsewhere/{handler.path.rpartition('/')[2]}"}, b"")


def _drop_then_no_range(handler: _Handler, headers: dict[str, str], data: bytes) -> None:
    if handler.headers["Range"]:
        handler.reply(200, headers, data)  # as if no range had been asked for
    else:
        _closed_early(handler, headers, data)


def _drop_then_416(handler: _Handler, headers: dict[str, str], data: bytes) -> None:
    if handler.headers["Range"]:
        handler.reply(416, {"Content-Range": f"bytes */{len(data)}"}, b"")
    else:
        _closed_early(handler, headers, data)


FAULTS: dict[str, Answer] = {
    "the connection is reset": _reset,
    "the connection is closed early": _closed_early,
    "the answer stalls": _stall,
    "the length is too small": _short_length,
    "the length is too large": _long_length,
    "HTML with 200": _html,
    "HTML of the right size": _html_of_the_size,
    "wrong bytes": _wrong_bytes,
    "429 with Retry-After": _too_many,
    "503": lambda handler, headers, data: handler.reply(503, {}, b"busy"),
    "500": lambda handler, headers, data: handler.reply(500, {}, b"oops"),
    "a redirect": _redirect,
    "dropped, then ranges are ignored": _drop_then_no_range,
    "dropped, then 416": _drop_then_416,
}


def text_of(name: str, number: int) -> str:
    """A document that does not compress away."""
    return f"{name} {number} {hashlib.sha256(f'{name} {number}'.encode()).hexdigest()}"


@contextlib.contextmanager
def running(folder: Path, names: list[str], documents: int = 1500) -> Iterator[Hub]:
    """A hub with shards of these names, made in `folder`."""
    contents = {}
    for name in names:
        texts = (text_of(name, i) for i in range(documents))
        [written] = parquet_shards.write_shards(texts, folder, "train", 0)
        contents[name] = (folder / written.name).read_bytes()
    hub = Hub(contents)
    try:
        yield hub
    finally:
        hub.close()


def numbered(count: int) -> list[str]:
    """Names of `count` training shards and the validation shard."""
    return [*(f"shard_{i:05d}.parquet" for i in range(count)), VAL]


def environment(hub: Hub, base: Path) -> dict[str, str]:
    """What makes huggingface_hub ask this hub, and wait a second at most for an answer."""
    return {
        **os.environ,
        "NANOCHAT_BASE_DIR": str(base),
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(base / "hf"),
        "HF_TOKEN": "secret",
        "HF_HUB_DOWNLOAD_TIMEOUT": "1",
        "NO_PROXY": "127.0.0.1",
    }


def start(
    hub: Hub, base: Path, *arguments: str, delays_s: str = "0.1,0.1", corpus: str = "fineweb-edu"
) -> subprocess.Popen[str]:
    """The command a user types, with the hub elsewhere."""
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, delays_s, "--corpus", corpus, *arguments],
        env=environment(hub, base),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def fetch(
    hub: Hub, base: Path, *arguments: str, delays_s: str = "0.1,0.1", corpus: str = "fineweb-edu"
) -> subprocess.CompletedProcess[str]:
    """The same, to its end."""
    process = start(hub, base, *arguments, delays_s=delays_s, corpus=corpus)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
