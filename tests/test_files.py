"""What is at its own name is whole: atomic writes, hashes, archives that try to escape."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from nanochat.common import files
from nanochat.common.errors import UserError


def test_base_dir_follows_the_environment(base_dir: Path) -> None:
    assert files.base_dir() == base_dir
    assert files.checkpoints_dir("d4") == base_dir / "runs" / "d4" / "checkpoints"
    assert not base_dir.exists()


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "/etc"])
def test_names_that_would_leave_the_base_directory_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="not a usable name"):
        files.run_dir(name)


def test_atomic_write_replaces_and_leaves_no_temporary(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"
    files.atomic_write(path, "one")
    files.atomic_write(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(path.parent.iterdir()) == [path]


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    files.atomic_write(path, "old")
    with pytest.raises(RuntimeError), files.atomic_path(path) as temporary:
        temporary.write_text("half of the new one")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_failed_folder_keeps_the_old_folder(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    with files.atomic_dir(folder) as temporary:
        (temporary / "a").write_text("old")
    with pytest.raises(RuntimeError), files.atomic_dir(folder) as temporary:
        (temporary / "a").write_text("new")
        raise RuntimeError
    assert (folder / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [folder]


def made_by(path: Path, place: str, pid: int) -> Path:
    """What a process of some machine has begun beside a path."""
    made = path.with_name(f".tmp-{path.name}@{place}.{pid}")
    made.mkdir()
    (made / "part").write_text("x")
    return made


@pytest.fixture
def dead() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


HERE = files.temporary(Path("x")).name.split("@")[1].split(".")[0]
DAY = files.ABANDONED_S


def age(path: Path, seconds: float) -> None:
    for part in [*path.rglob("*"), path]:
        os.utime(part, (time.time() - seconds,) * 2)


def test_sweep_takes_what_dead_writers_of_here_left_and_nothing_else(tmp_path: Path, dead: int) -> None:
    made_by(tmp_path / "step_000005", HERE, dead)
    (tmp_path / f".old-step_000004@{HERE}.{dead}").mkdir()
    (tmp_path / f".tmp-file@{HERE}.{dead}").write_text("x")
    kept = [made_by(tmp_path / "step_000006", HERE, pid) for pid in (os.getpid(), os.getppid())]
    age(kept[0], 2 * DAY)
    kept += [tmp_path / "step_000001", tmp_path / ".tmp-of-another-kind"]
    for path in kept[2:]:
        path.mkdir()
    files.sweep_temporaries(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_a_folder_is_written_where_a_killed_writer_left_one_which_goes(tmp_path: Path, dead: int) -> None:
    left = tmp_path / f".tmp-exported@{HERE}.{dead}"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half of it")
    with files.atomic_dir(tmp_path / "another") as written:
        (written / "model.safetensors").write_bytes(b"whole")
    assert [path.name for path in tmp_path.iterdir()] == ["another"]


def test_sweep_leaves_other_machines_and_earlier_releases_alone_for_a_day(tmp_path: Path, dead: int) -> None:
    fresh = made_by(tmp_path / "fresh", "0123abcd", dead)
    busy = made_by(tmp_path / "busy", "0123abcd", os.getpid())
    age(busy, 2 * DAY)
    (busy / "part").write_text("written a moment ago")
    unnamed = tmp_path / f".tmp-unnamed.{dead}"
    unnamed.mkdir()
    future = made_by(tmp_path / "future", "0123abcd", dead)
    age(future, -2 * DAY)
    files.sweep_temporaries(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([busy, fresh, future, unnamed])
    for path in (fresh, busy, unnamed):
        age(path, DAY + 60)
    files.sweep_temporaries(tmp_path)
    assert list(tmp_path.iterdir()) == [future]


def test_who_alone_writes_a_name_sweeps_it_whoever_began_it(tmp_path: Path, dead: int) -> None:
    for place, pid in (("0123abcd", dead), ("0123abcd", 1), (HERE, dead), (HERE, os.getpid())):
        made_by(tmp_path / "mine", place, pid)
    (tmp_path / f".tmp-mine.{dead}").mkdir()
    kept = [made_by(tmp_path / name, "0123abcd", dead) for name in ("mine.too", "yours")]
    files.sweep_temporaries(tmp_path, owned="mine")
    assert sorted(tmp_path.iterdir()) == sorted(kept)
    files.sweep_temporaries(tmp_path, owned="*")
    assert list(tmp_path.iterdir()) == []


def test_sweep_never_touches_a_download(tmp_path: Path, dead: int) -> None:
    stages = [made_by(tmp_path / "fetch", place, dead) for place in (HERE, "0123abcd")]
    stages.append(tmp_path / f".tmp-fetch.{dead}")
    stages[-1].mkdir()
    for stage in stages:
        age(stage, 2 * DAY)
    files.sweep_temporaries(tmp_path, owned="*")
    assert sorted(tmp_path.iterdir()) == sorted(stages)


def test_sweep_asks_the_clock_of_the_disk(tmp_path: Path, dead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = made_by(tmp_path / "x", "0123abcd", dead)
    monkeypatch.setattr(time, "time", lambda: 9e9)
    files.sweep_temporaries(tmp_path)
    assert list(tmp_path.iterdir()) == [made]


def test_a_container_of_this_machine_is_another_place(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, namespace = files.machine()
    places = set()
    for told in ((machine, namespace), (machine, "pid:[1]"), ("another", namespace)):
        monkeypatch.setattr(files, "machine", lambda told=told: told)
        files._place.cache_clear()
        places.add(files.temporary(Path("x")).name)
    files._place.cache_clear()
    assert len(places) == 3


def test_a_folder_is_replaced_in_two_renames_and_its_old_content_deleted_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill while the old content is deleted, which may take long, finds the new one in place."""
    for text in ("old", "new"):
        with files.atomic_dir(tmp_path / "f") as written:
            (written / "a").write_text(text)
            monkeypatch.setattr(shutil, "rmtree", lambda path, **options: None)
    assert (tmp_path / "f" / "a").read_text() == "new"
    assert [path.name.split("@")[0] for path in tmp_path.glob(".*")] == [".old-f"]


def test_full_disk_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    files.atomic_write(tmp_path / "a", "old")
    script = """
        import resource, signal, sys
        from pathlib import Path
        from nanochat.common import files
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            files.atomic_write(Path(sys.argv[1]), b"x" * 5000)
        except OSError as error:
            sys.exit(7)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "a")]
    assert subprocess.run(command).returncode == 7
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_json_round_trip_and_refusals(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    files.write_json(path, {"a": [1, 2.5, "ü"]})
    assert files.read_json(path) == {"a": [1, 2.5, "ü"]}
    with pytest.raises(ValueError, match="Out of range"):
        files.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text("utf-8"))["a"][0] == 1
    with pytest.raises(UserError, match=r"absent\.json"):
        files.read_json(tmp_path / "absent.json")
    path.write_text('{"a": 1')
    with pytest.raises(UserError, match=r"x\.json: not a JSON file"):
        files.read_json(path)


def test_sha256_of_a_file_over_one_block(tmp_path: Path) -> None:
    data = os.urandom(files.COPY_BYTES + 17)
    (tmp_path / "a").write_bytes(data)
    assert files.sha256(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_require_writable_names_the_folder_and_what_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = tmp_path / "file"
    taken.write_text("x")
    with pytest.raises(UserError, match=r"file/below: .*Make \S*file\S* a folder that you can write to"):
        files.require_writable(taken / "below")
    files.require_writable(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"No space left on device.*Free some space"):
        files.require_writable(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for given, found in (("~", ""), ("~/nb", "nb"), ("~/a/~b", "a/~b"), ("", ".cache/nanochat")):
        monkeypatch.setenv("NANOCHAT_BASE_DIR", given)
        assert files.base_dir() == tmp_path / found
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "nb~/x")
    assert files.base_dir() == Path("nb~/x")


@pytest.mark.parametrize("given", ["", "~", "~/x", "~nobody-of-this-name/x"])
def test_without_a_home_folder_the_variable_that_helps_is_named(
    given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_home(self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", no_home)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", given)
    with pytest.raises(UserError, match="Set NANOCHAT_BASE_DIR"):
        files.base_dir()


def test_a_base_directory_that_is_not_utf8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "caf\udce9")
    with pytest.raises(UserError, match=r"NANOCHAT_BASE_DIR='caf\\udce9': not UTF-8"):
        files.base_dir()


def test_bytes_that_are_no_text_are_written_as_their_digits(tmp_path: Path) -> None:
    names = {"file": "caf\udce9.txt", "half": "\ud83d", "text": "caf\u00e9 \U0001f600", "\udcff": 1}
    files.write_json(tmp_path / "a.json", names)
    assert files.read_json(tmp_path / "a.json") == {
        "file": r"caf\xe9.txt",
        "half": r"\ud83d",
        "text": "caf\u00e9 \U0001f600",
        r"\xff": 1,
    }


def test_an_error_of_a_descriptor_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system says "Input/output error" of a descriptor; a person has to know of which file."""

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    (tmp_path / "file").touch()
    for write in (
        lambda: files.fsync(tmp_path / "file"),
        lambda: files.fsync(tmp_path),
        lambda: files.write_json(tmp_path / "a.json", {}),
    ):
        with pytest.raises(OSError, match="Input/output error") as caught:
            write()
        assert str(tmp_path) in str(caught.value.filename)
