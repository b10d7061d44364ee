"""The CORE tasks over a network that fails: whole and right in the end, or absent with one clear line."""

import hashlib
import io
import json
import os
import subprocess
import sys
import zipfile

import pytest

from nanochat.common import files
from nanochat.common.errors import UserError
from nanochat.evaluation.core import download, evaluate
from tests.hub_server import FAULTS, Hub

CONTENTS = {
    "core.yaml": b"icl_tasks: []\n",
    "eval_meta_data.csv": b"Eval Task,Random baseline\n",
    "eval_data/kind/task.jsonl": os.urandom(200_000),
}
ZIP = "eval_bundle.zip"
FEW = (0.01, 0.01)


def zip_of(contents):
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    return sink.getvalue()


PUBLIC = zip_of({f"eval_bundle/{name}": data for name, data in CONTENTS.items()} | {"eval_bundle/more": b"x"})


@pytest.fixture
def server(base_dir, monkeypatch):
    """A server of the zip, whose files are taken for the public ones."""
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in CONTENTS.items()}
    monkeypatch.setattr(download, "public_files", lambda: digests)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download, "TIMEOUT_S", 1.0)
    server = Hub({ZIP: PUBLIC})
    yield server
    server.close()


def fetch(server):
    return download.fetch(f"{server.url}/elsewhere/{ZIP}", FEW)


def assert_whole():
    folder = files.eval_bundle_dir()
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == set(CONTENTS)  # what has no hash is not unpacked
    assert download.differences(folder) == []
    assert {path.name for path in folder.parent.iterdir()} == {"eval_bundle"}


def test_the_files_are_unpacked_once_and_found_without_a_flag(server):
    assert fetch(server) == files.eval_bundle_dir()
    assert_whole()
    assert evaluate.find_bundle("").text("core.yaml") == CONTENTS["core.yaml"].decode()
    fetch(server)
    assert server.requests[ZIP] == 1


WRONG = {"HTML with 200", "HTML of the right size", "wrong bytes", "the length is too small"}


@pytest.mark.parametrize("fault", sorted(set(FAULTS) - WRONG))
def test_a_fault_that_passes_is_survived(server, fault):
    server.faults[ZIP], server.times[ZIP] = fault, 1
    fetch(server)
    assert_whole()


@pytest.mark.parametrize("fault", sorted(WRONG))
def test_other_bytes_are_never_unpacked_nor_kept(server, fault):
    server.faults[ZIP], server.times[ZIP] = fault, 1
    with pytest.raises(UserError, match=f"^{server.url}.*{ZIP}: "):
        fetch(server)
    assert list(files.base_dir().iterdir()) == []
    fetch(server)
    assert_whole()


def test_a_broken_transfer_goes_on_where_it_broke(server):
    server.faults[ZIP], server.times[ZIP] = "the connection is closed early", 1
    fetch(server)
    assert (server.requests[ZIP], server.ranges[ZIP]) == (1, 1)
    assert_whole()


def test_what_a_killed_download_left_is_used(server):
    files.eval_bundle_part().parent.mkdir(parents=True, exist_ok=True)
    files.eval_bundle_part().write_bytes(PUBLIC[:150_000])
    fetch(server)
    assert (server.requests[ZIP], server.ranges[ZIP]) == (0, 1)
    assert_whole()


@pytest.mark.parametrize("fault", ["503", "the connection is closed early", "the answer stalls"])
def test_a_fault_that_stays_is_one_clear_error_and_what_arrived_is_kept(server, fault):
    server.faults[ZIP] = fault
    with pytest.raises(UserError, match=r"cannot be fetched .*run the same command again"):
        fetch(server)
    assert not files.eval_bundle_dir().exists()
    server.faults.clear()
    fetch(server)
    assert_whole()


def test_a_file_with_other_bytes_is_named(server):
    server.contents[ZIP] = zip_of(CONTENTS | {"eval_data/kind/task.jsonl": b"{}"})
    with pytest.raises(UserError, match=r"eval_data/kind/task.jsonl has other bytes"):
        fetch(server)
    server.contents[ZIP] = zip_of({"core.yaml": CONTENTS["core.yaml"]})
    with pytest.raises(UserError, match=r"eval_meta_data.csv: the file is missing"):
        fetch(server)
    server.contents[ZIP] = zip_of(CONTENTS | {"../outside": b"x"})
    with pytest.raises(UserError, match=r"'../outside' leads out of it"):
        fetch(server)
    assert list(files.base_dir().iterdir()) == []


def test_a_folder_of_another_bundle_is_left_as_it_is(server):
    folder = files.eval_bundle_dir()
    folder.mkdir(parents=True)
    (folder / "core.yaml").write_text("mine")
    with pytest.raises(
        UserError, match="3 of 3 files are missing or not the public bundle's, the first is core.yaml"
    ):
        fetch(server)
    assert (folder / "core.yaml").read_text() == "mine"
    assert server.requests[ZIP] == 0


def test_what_cannot_be_an_answer_is_refused_at_once(server, base_dir, monkeypatch):
    with pytest.raises(UserError, match=r"cannot be fetched \(HTTP Error 404"):
        download.fetch(f"{server.url}/elsewhere/absent.zip", (60.0,))
    with pytest.raises(UserError, match="--url=file:///etc: expected http"):
        download.fetch("file:///etc")
    monkeypatch.setattr(download, "MAX_ZIP_BYTES", len(PUBLIC) - 1)
    with pytest.raises(UserError, match="more than any eval bundle"):
        fetch(server)
    monkeypatch.undo()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base_dir))
    monkeypatch.setattr(files, "free_bytes", lambda path: 1_000_000)
    with pytest.raises(UserError, match="no room"):
        fetch(server)


# The command with the hashes of the bundle that is served here.
COMMAND = (
    "import json, sys; from nanochat.evaluation.core import download as core_download\n"
    "hashes = json.loads(sys.argv.pop(1)); core_download.public_files = lambda: hashes\n"
    "from scripts.core_download import main; main()"
)


def started(server):
    url = f"--url={server.url}/elsewhere/{ZIP}"
    command = [sys.executable, "-c", COMMAND, json.dumps(download.public_files()), url]
    environment = os.environ | {"NANOCHAT_BASE_DIR": str(files.base_dir())}
    return subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True)


def test_of_several_at_once_one_fetches_and_the_others_find_the_folder(server):
    server.chunk_s = 0.2
    commands = [started(server) for _ in range(3)]
    ends = [command.communicate(timeout=60) for command in commands]
    assert [command.returncode for command in commands] == [0, 0, 0], ends
    assert_whole()
    assert (server.requests[ZIP], server.ranges[ZIP]) == (1, 0)
    assert sum("waiting for its end" in out for out, _ in ends) >= 1


def test_where_the_first_of_two_is_killed_the_second_goes_on(server):
    server.chunk_s = 0.3
    first = started(server)
    part = files.eval_bundle_part()
    while not (part.exists() and part.stat().st_size):
        assert first.poll() is None, first.communicate()
    second = started(server)
    first.kill()
    out, err = second.communicate(timeout=60)
    assert second.returncode == 0, out + err
    assert server.requests[ZIP] + server.ranges[ZIP] == 2
    first.communicate()
    assert_whole()


@pytest.mark.parametrize("kind", ["link", "hard link", "link to nowhere", "pipe"])
def test_what_lies_where_the_download_goes_is_not_written_to(server, tmp_path, kind):
    mine, part = tmp_path / "mine", files.eval_bundle_part()
    part.parent.mkdir(parents=True)
    mine.write_text("my text")
    if kind == "pipe":
        os.mkfifo(part)
    elif kind == "hard link":
        os.link(mine, part)
    else:
        part.symlink_to(mine if kind == "link" else tmp_path / "nowhere")
    fetch(server)
    assert_whole()
    assert mine.read_text() == "my text"
    assert not (tmp_path / "nowhere").exists()


def test_a_link_that_takes_the_name_meanwhile_is_not_followed(server, tmp_path, monkeypatch):
    mine, part = tmp_path / "mine", files.eval_bundle_part()
    mine.write_text("my text")
    room = download._require_room

    def take(url, path, have, total):
        room(url, path, have, total)
        if not path.is_symlink():
            path.symlink_to(mine)

    monkeypatch.setattr(download, "_require_room", take)
    monkeypatch.setattr(download, "_size", lambda path: 0)
    with pytest.raises(UserError, match="cannot be fetched"):
        download._download(f"{server.url}/elsewhere/{ZIP}", part, ())
    assert mine.read_text() == "my text"


def test_a_folder_where_the_download_goes_is_named(server):
    files.eval_bundle_part().mkdir(parents=True)
    with pytest.raises(UserError, match=r"eval_bundle.zip.part: a folder.* Move it away"):
        fetch(server)


@pytest.mark.parametrize("length", ["-5", "1e9", "9" * 5000, "12,34", "abc", "\u0661\u0662", ""])
def test_a_length_that_is_no_number_says_nothing(server, monkeypatch, length):
    def answer(handler, headers, data):
        handler.send_response(200)
        handler.send_header("Content-Length", length.encode("utf-8").decode("latin-1"))
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.wfile.write(data)
        handler.close_connection = True

    monkeypatch.setitem(FAULTS, "a length", answer)
    server.faults[ZIP] = "a length"
    fetch(server)
    assert_whole()


@pytest.mark.parametrize(
    "url", ["http://[", "http://host:port/x", "http://h\u00e9 llo/", "http://a..b/\u00e9", "http:///x"]
)
def test_an_address_that_is_none_is_one_clear_error(base_dir, url):
    with pytest.raises(UserError, match="cannot be"):
        download.fetch(url, ())
    assert not files.eval_bundle_lock().exists()


def test_the_hashes_are_those_of_the_real_bundle(shared_data):
    lines = (shared_data / "eval_bundle.sha256").read_text().splitlines()
    known = {name.removeprefix("eval_bundle/"): digest for digest, name in map(str.split, lines)}
    assert download.public_files().items() <= known.items()
    tasks = {name for name in known if name.endswith(".jsonl")} | {"core.yaml", "eval_meta_data.csv"}
    assert set(download.public_files()) == tasks
    assert len(tasks) == 23


def test_the_command_fetches_the_real_bundle(shared_data, base_dir, monkeypatch):
    server = Hub({ZIP: (shared_data / "eval_bundle.zip").read_bytes()})
    command = [sys.executable, "-m", "scripts.core_download", "--url", f"{server.url}/elsewhere/{ZIP}"]
    environment = {**os.environ, "NO_PROXY": "127.0.0.1", "NANOCHAT_BASE_DIR": str(base_dir)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    server.close()
    assert (result.returncode, result.stderr) == (0, "")
    assert "23 files, all verified" in result.stdout
    assert download.differences(files.eval_bundle_dir()) == []
