"""Locks: one process has the thing, the others are told who, and a killed owner has it no longer."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanochat.common import files, locks
from nanochat.common.errors import UserError
from tests.conftest import REPO

# Takes the lock, says so, and keeps it until it is told to go on; may be started without flock.
HOLDER = """
import sys
from pathlib import Path
from nanochat.common import locks
if sys.argv[2] == "no-flock":
    locks._flock = lambda descriptor: None
with locks.held(Path(sys.argv[1]), "the thing"):
    print("held", flush=True)
    sys.stdin.readline()
"""

# Eight of these at once: each makes the thing unless it is there, and says which it did.
MAKER = """
import sys, time
from pathlib import Path
from nanochat.common import locks
folder = Path(sys.argv[1])
if sys.argv[2] == "no-flock":
    locks._flock = lambda descriptor: None
sys.stdin.readline()
with locks.held(folder / "lock", "the thing", wait=True):
    if not (folder / "thing").exists():
        time.sleep(0.3)
        (folder / "thing").write_text("whole")
        print("made")
"""

KINDS = ["flock", "no-flock"]


def start(code: str, path: Path, kind: str) -> subprocess.Popen[str]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", code, str(path), kind], cwd=REPO, text=True, **pipes)


@pytest.fixture
def holder(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock at tmp_path / "lock"."""
    process = start(HOLDER, tmp_path / "lock", getattr(request, "param", "flock"))
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Owners are believed dead after two seconds without a sign."""
    monkeypatch.setattr(locks, "STALE_S", 2.0)
    monkeypatch.setattr(locks, "SETTLE_S", 0.1)


def test_the_second_is_refused_and_told_who_has_it(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with (
        pytest.raises(UserError, match=f"the thing is in use by process {holder.pid} on host .* Stop it"),
        locks.held(tmp_path / "lock", "the thing", "Stop it."),
    ):
        pass
    assert holder.poll() is None


def test_the_owner_is_named_with_its_command_and_since_when(tmp_path: Path) -> None:
    with locks.held(tmp_path / "lock", "x"):
        owner = json.loads((tmp_path / "lock").read_text())
        assert owner["pid"] == os.getpid()
        assert owner["command"]  # of pytest, or of the worker that it has started
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC", owner["since"])
    assert list(tmp_path.iterdir()) == []  # nothing is left


@pytest.mark.parametrize("holder", KINDS, indirect=True)
def test_kill_9_of_the_owner_frees_it(
    tmp_path: Path, holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    if "no-flock" in holder.args:  # type: ignore[operator]
        monkeypatch.setattr(locks, "_flock", lambda _: None)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "lock").exists()
    began = time.monotonic()
    with locks.held(tmp_path / "lock", "the thing"):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert time.monotonic() - began < locks.STALE_S  # its process is known to be gone: nothing is waited for


@pytest.mark.parametrize("holder", KINDS, indirect=True)
def test_who_waits_has_it_when_the_owner_has_ended(
    tmp_path: Path,
    holder: subprocess.Popen[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    quick: None,
) -> None:
    if "no-flock" in holder.args:  # type: ignore[operator]
        monkeypatch.setattr(locks, "_flock", lambda _: None)
    got_it = threading.Event()

    def wait() -> None:
        with locks.held(tmp_path / "lock", "the thing", wait=True):
            got_it.set()

    thread = threading.Thread(target=wait)
    thread.start()
    assert not got_it.wait(0.7)
    holder.communicate("\n")
    assert got_it.wait(20)
    thread.join()
    assert capsys.readouterr().out.count("waiting for its end") <= 1  # at most once


@pytest.mark.parametrize("kind", KINDS)
def test_of_many_that_want_one_thing_made_one_makes_it(tmp_path: Path, kind: str) -> None:
    makers = [start(MAKER, tmp_path, kind) for _ in range(4)]
    for maker in makers:
        assert maker.stdin is not None
        maker.stdin.write("\n")
        maker.stdin.flush()
    told = [maker.communicate(timeout=60)[0] for maker in makers]
    assert [maker.returncode for maker in makers] == [0] * len(makers)
    assert sum(text.splitlines().count("made") for text in told) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["thing"]


def owner_elsewhere(path: Path, **changes: object) -> None:
    """A lock whose owner is on another machine, where flock does not reach."""
    entry = {
        "host": "far",
        "machine": "m2",
        "namespace": "pid:[1]",
        "pid": 1,
        "since": "then",
        "command": "c",
    }
    path.write_text(json.dumps({**entry, **changes}))


def test_an_owner_of_another_machine_that_renews_its_file_is_respected(tmp_path: Path, quick: None) -> None:
    path = tmp_path / "lock"
    owner_elsewhere(path)
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.1):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with (
            pytest.raises(UserError, match="process 1 on host far since then"),
            locks.held(path, "the thing"),
        ):
            pass
    finally:
        ended.set()
        thread.join()


def test_an_owner_of_another_machine_that_renews_nothing_is_dead(tmp_path: Path, quick: None) -> None:
    owner_elsewhere(tmp_path / "lock")
    with locks.held(tmp_path / "lock", "the thing"):
        pass


def test_a_clock_that_is_wrong_by_a_day_changes_nothing(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What counts is the clock that dates the files."""
    owner_elsewhere(tmp_path / "lock")
    hour_ago = files.disk_time(tmp_path) - 3600
    os.utime(tmp_path / "lock", (hour_ago, hour_ago))
    for wrong in (-86400, 86400):
        monkeypatch.setattr(time, "time", lambda wrong=wrong: hour_ago + wrong)
        began = time.monotonic()
        with locks.held(tmp_path / "lock", "the thing"):
            pass
        assert time.monotonic() - began < locks.STALE_S
        owner_elsewhere(tmp_path / "lock")
        os.utime(tmp_path / "lock", (hour_ago, hour_ago))


@pytest.mark.parametrize(
    "content", ["", "nonsense", "[]", '{"pid": "x"}', '{"pid": 1, "other": 2}', "[" * 50_000, "9" * 5_000]
)
def test_a_file_that_names_nobody_is_free(tmp_path: Path, content: str) -> None:
    (tmp_path / "lock").write_text(content)
    with locks.held(tmp_path / "lock", "the thing"):
        pass


def test_a_link_at_the_locks_name_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "lock").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match="lock"), locks.held(tmp_path / "lock", "the thing"):
        pass
    assert (tmp_path / "mine").read_text() == "precious"


def test_the_owner_renews_the_time_of_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "BEAT_S", 0.05)
    path = tmp_path / "lock"
    with locks.held(path, "the thing"):
        os.utime(path, (1.0, 1.0))
        deadline = time.monotonic() + 20
        while path.stat().st_mtime == 1.0:
            assert time.monotonic() < deadline
            time.sleep(0.01)
