"""The shim that makes calls fail: each operation, the call that was chosen, and nothing else."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dev.fault_box import FAULT_LOG, SHORT, Skip, failing_calls

CALLS = {
    "open": "open(path)",
    "create": "os.open(path, os.O_RDWR); os.open(path, os.O_RDWR | os.O_CREAT)",
    "read": "open(path).read()",
    "write": "os.write(fd, b'x')",
    "fsync": "os.fsync(fd)",
    "close": "os.close(fd)",
    "truncate": "os.ftruncate(fd, 1)",
    "rename": "os.rename(path, path + '2')",
    "unlink": "os.unlink(path)",
    "mkdir": "os.mkdir(path + '.d')",
}
TRY = """
import os, sys
path = sys.argv[1]
fd = os.open(path, os.O_RDWR)
try:
    {call}
    print("done")
except OSError as error:
    print(error.errno)
"""


def run(code: str, path: Path, ops: str, error: int, **when: object) -> list[str]:
    """What the code prints, a line each, when such calls on this file fail."""
    try:
        environment = failing_calls(path.parent, ops, path.name, error, **when)  # type: ignore[arg-type]
    except Skip as reason:
        pytest.skip(str(reason))
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "some-file"
    file.write_bytes(b"0123456789")
    return file


@pytest.mark.parametrize("op", list(CALLS))
def test_an_operation_fails_on_the_file_that_was_named(op: str, path: Path) -> None:
    if op == "open":  # the line before it opens, too
        assert run(TRY.format(call=CALLS[op]), path, op, errno.EIO, first=2) == [str(errno.EIO)]
    else:
        assert run(TRY.format(call=CALLS[op]), path, op, errno.EIO) == [str(errno.EIO)]
    assert (path.parent / FAULT_LOG).read_text().startswith(f"{op} {path}")


def test_another_file_is_left_alone(path: Path) -> None:
    other = path.with_name("other")
    other.touch()
    code = TRY.format(call="os.write(os.open(path.replace('some-file', 'other'), os.O_WRONLY), b'x')")
    assert run(code, path, "write", errno.EIO) == ["done"]


def test_only_the_chosen_calls_fail(path: Path) -> None:
    code = """
import os, sys
fd = os.open(sys.argv[1], os.O_WRONLY)
for n in range(5):
    try:
        os.write(fd, b"x"); print("done")
    except OSError as error:
        print(os.strerror(error.errno))
"""
    full = "No space left on device"
    assert run(code, path, "write", errno.ENOSPC, first=2, times=2) == ["done", full, full, "done", "done"]


def test_half_of_a_write_is_written(path: Path) -> None:
    code = "import os, sys; print(os.write(os.open(sys.argv[1], os.O_WRONLY), b'x' * 100))"
    assert run(code, path, "write", SHORT) == ["50"]


def test_calls_fail_only_while_a_file_is_there(path: Path) -> None:
    when = path.with_name("now")
    code = """
import os, sys
fd = os.open(sys.argv[1], os.O_WRONLY)
for there in (False, True, False):
    if there:
        open(os.environ["FAULT_WHEN"], "w")
    elif os.path.exists(os.environ["FAULT_WHEN"]):
        os.unlink(os.environ["FAULT_WHEN"])
    try:
        os.write(fd, b"x"); print("done")
    except OSError:
        print("failed")
"""
    assert run(code, path, "write", errno.EIO, when=when) == ["done", "failed", "done"]
