"""Downloads, from a local server that speaks what huggingface_hub needs: HEAD with etag, ranged GET."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from nanochat import shards
from nanochat.hub import HUB_CORPORA

REPO = HUB_CORPORA["fineweb-edu"].repo
COMMIT = "0123456789abcdef0123456789abcdef01234567"
VAL = "shard_01822.parquet"


class Hub:
    """A hub with one data set. `faults` makes it misbehave for a file, `requests` counts the GETs of each."""

    def __init__(self, contents: dict[str, bytes]) -> None:
        self.contents = contents
        self.faults: dict[str, str] = {}
        self.requests: Counter[str] = Counter()
        self.tokens: set[str | None] = set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.answer(send_body=False)

            def do_GET(self) -> None:
                self.answer(send_body=True)

            def answer(self, send_body: bool) -> None:
                name = self.path.rpartition("/")[2]
                expected = [f"/datasets/{REPO}/resolve/{revision}/{name}" for revision in ("main", COMMIT)]
                if name.endswith(".parquet"):  # the client also asks for things of its own
                    hub.tokens.add(self.headers["Authorization"])
                    hub.requests[name] += send_body
                if self.path not in expected or name not in hub.contents:
                    self.reply(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b"", True)
                    return
                data = hub.contents[name]
                headers = {
                    "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
                    "X-Linked-Size": str(len(data)),
                    "X-Repo-Commit": COMMIT,
                    "Accept-Ranges": "bytes",
                }
                fault = hub.faults.get(name)
                if fault == "wrong bytes" and send_body:
                    data = bytes(len(data))
                if fault == "wrong bytes once" and send_body:
                    del hub.faults[name]
                    data = bytes(len(data))
                if fault == "unavailable once" and send_body:
                    del hub.faults[name]
                    self.reply(503, {}, b"busy", True)
                    return
                status = 200
                if (wanted := self.headers["Range"]) and send_body:
                    first = int(wanted.removeprefix("bytes=").split("-")[0])
                    headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
                    data, status = data[first:], 206
                self.reply(status, headers, data, send_body)

            def reply(self, status: int, headers: dict[str, str], data: bytes, send_body: bool) -> None:
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if send_body and self.command != "HEAD":
                    self.wfile.write(data)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    contents = {}
    for name in ("shard_00000.parquet", "shard_00001.parquet", "shard_00002.parquet", VAL):
        [written] = shards.write_shards([f"{name} document {i}" for i in range(1500)], tmp_path, "train", 0)
        contents[name] = (tmp_path / written.name).read_bytes()
    server = Hub(contents)
    yield server
    server.server.shutdown()
    server.server.server_close()


def fetch(hub: Hub, base: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command a user types, with the hub elsewhere."""
    environment = {
        **os.environ,
        "NANOCHAT_BASE_DIR": str(base),
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(base / "hf"),
        "HF_TOKEN": "secret",
        "NO_PROXY": "127.0.0.1",
    }
    return subprocess.run(
        [sys.executable, "-m", "nanochat.dataset", "--corpus", "fineweb-edu", *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )


def test_shards_arrive_verified_and_are_not_fetched_again(hub: Hub, base_dir: Path) -> None:
    done = fetch(hub, base_dir, "-n", "2")
    assert done.returncode == 0, done.stderr
    folder = base_dir / "data" / "fineweb-edu"
    assert sorted(p.name for p in folder.iterdir()) == [
        "manifest.json",
        "shard_00000.parquet",
        "shard_00001.parquet",
        VAL,
    ]
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    assert manifest["source"] == f"{REPO}@{COMMIT}"
    assert [(s["name"], s["split"], s["documents"], s["row_groups"]) for s in manifest["shards"]] == [
        ("shard_00000.parquet", "train", 1500, 2),
        ("shard_00001.parquet", "train", 1500, 2),
        (VAL, "val", 1500, 2),
    ]
    for shard in manifest["shards"]:
        assert shard["sha256"] == hashlib.sha256(hub.contents[shard["name"]]).hexdigest()
        assert (folder / shard["name"]).read_bytes() == hub.contents[shard["name"]]
    assert hub.tokens == {"Bearer secret"}

    assert fetch(hub, base_dir, "-n", "2").returncode == 0
    assert fetch(hub, base_dir, "-n", "3").returncode == 0
    assert hub.requests == dict.fromkeys(hub.contents, 1)

    (folder / "shard_00001.parquet").write_bytes(b"cut")
    assert fetch(hub, base_dir, "-n", "3").returncode == 0
    assert hub.requests["shard_00001.parquet"] == 2
    assert (folder / "shard_00001.parquet").read_bytes() == hub.contents["shard_00001.parquet"]


def test_a_missing_shard_is_named_with_exit_code_2_and_the_others_are_kept(hub: Hub, base_dir: Path) -> None:
    missing = hub.contents.pop("shard_00001.parquet")
    failed = fetch(hub, base_dir, "-n", "3")
    assert failed.returncode == 2
    [line] = failed.stderr.splitlines()
    assert "1 missing: shard_00001.parquet" in line
    assert "shard_00002" not in line
    assert not (base_dir / "data" / "fineweb-edu" / "manifest.json").exists()
    hub.contents["shard_00001.parquet"] = missing
    assert fetch(hub, base_dir, "-n", "3").returncode == 0
    assert set(hub.requests.values()) == {1}


def test_a_missing_validation_shard_stops_it(hub: Hub, base_dir: Path) -> None:
    del hub.contents[VAL]
    failed = fetch(hub, base_dir, "-n", "1")
    assert failed.returncode == 2
    assert VAL in failed.stderr


def test_wrong_bytes_and_outages_are_fetched_again(hub: Hub, base_dir: Path) -> None:
    hub.faults = {"shard_00000.parquet": "wrong bytes once", VAL: "unavailable once"}
    done = fetch(hub, base_dir, "-n", "1")
    assert done.returncode == 0, done.stderr
    folder = base_dir / "data" / "fineweb-edu"
    assert (folder / "shard_00000.parquet").read_bytes() == hub.contents["shard_00000.parquet"]
    assert hub.requests["shard_00000.parquet"] == 2


def test_bytes_that_stay_wrong_are_named_and_not_kept(
    hub: Hub, base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.faults = {"shard_00000.parquet": "wrong bytes"}
    folder = tmp_path / "there"
    folder.mkdir()
    script = (
        "import sys; from pathlib import Path; from nanochat import hub, errors\n"
        "shard, folder = 'shard_00000.parquet', Path(sys.argv[2])\n"
        "try: hub.fetch(sys.argv[1], [shard], folder, None, retry_delays_s=[0, 0])\n"
        "except errors.UserError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, REPO, str(folder)],
        env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")},
        capture_output=True,
        text=True,
    )
    wrong = hashlib.sha256(bytes(len(hub.contents["shard_00000.parquet"]))).hexdigest()
    right = hashlib.sha256(hub.contents["shard_00000.parquet"]).hexdigest()
    assert f"shard_00000.parquet (what arrived has sha256 {wrong}, the hub has {right})" in done.stdout, done
    assert hub.requests["shard_00000.parquet"] == 3
    assert not (folder / "shard_00000.parquet").exists()


def test_no_hub_is_said_in_one_line(base_dir: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from nanochat import hub, errors\n"
        "try: hub.fetch('a/b', ['x.parquet'], Path(sys.argv[1]), None, retry_delays_s=[])\n"
        "except errors.UserError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env={**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf")},
        capture_output=True,
        text=True,
    )
    assert "a/b: 1 missing: x.parquet (" in done.stdout, done
