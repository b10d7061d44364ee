"""A console cannot end the work that prints to it: full, gone, closed, or without the letters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPO

# A command that prints in the ways of the program, works on after each, and says at the end that it is done.
COMMAND = r"""
import sys
from pathlib import Path
from rich.console import Console
from rich.table import Table
from nanochat.common import console, errors
@errors.cli
def main():
    for number in range(3):
        print("caf\u00e9 \u4f60\u597d \U0001f600", "half \ud83d", "x" * 5000, flush=True)
        Console().print("rich \u2014 \U0001f600", markup=False)
        Table().add_column("box")
        Console().print(Table("box"))
        sys.stdout.write("more\n")
    Path(sys.argv[1]).write_text(f"done {console.reader_is_gone()}")
main()
"""


def run(tmp_path: Path, stdout: Any, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", COMMAND, str(tmp_path / "done")],
        cwd=REPO,
        env={**os.environ, **env},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )


def done(tmp_path: Path) -> str:
    return (tmp_path / "done").read_text()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_is_said_once_and_is_the_exit_code(tmp_path: Path, unbuffered: str) -> None:
    with Path("/dev/full").open("w") as full:
        result = run(tmp_path, full, PYTHONUNBUFFERED=unbuffered)
    assert done(tmp_path) == "done False"
    assert result.returncode == 2
    first, last = result.stderr.splitlines()
    assert first == "warning: standard output: No space left on device; going on without it"
    assert last.startswith("error: standard output could not be written")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_who_has_left_is_not_missed(tmp_path: Path, unbuffered: str) -> None:
    theirs, ours = os.pipe()
    os.close(theirs)
    try:
        result = run(tmp_path, ours, PYTHONUNBUFFERED=unbuffered)
    finally:
        os.close(ours)
    assert done(tmp_path) == "done True"
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8", "ascii:strict"])
def test_letters_that_the_terminal_lacks_are_replaced(tmp_path: Path, encoding: str) -> None:
    result = run(tmp_path, subprocess.PIPE, PYTHONIOENCODING=encoding)
    assert (result.returncode, result.stderr) == (0, "")
    assert done(tmp_path) == "done False"


@pytest.mark.skipif(sys.platform == "win32", reason="descriptors of a shell")
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed_at_the_start_take_no_file_of_ours(tmp_path: Path, closed: str) -> None:
    script = f'"$0" -c "$1" "$2" {closed}'
    command = ["bash", "-c", script, sys.executable, COMMAND, str(tmp_path / "done")]
    result = subprocess.run(command, cwd=REPO, capture_output=True)
    assert result.returncode == 0, result.stderr
    assert done(tmp_path) == "done False"  # and nothing of what was printed


def test_a_stream_that_returns_instead_of_waiting_gets_everything(tmp_path: Path) -> None:
    theirs, ours = os.pipe()
    os.set_blocking(ours, False)
    code = (
        "from nanochat.common import errors\n"
        "@errors.cli\n"
        "def main():\n"
        "    for n in range(20000): print(n, 'x' * 50)\n"
        "main()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=REPO, stdout=ours)
    os.close(ours)
    with os.fdopen(theirs) as reader:
        lines = reader.read().splitlines()
    assert process.wait() == 0
    assert [line.split()[0] for line in lines] == [str(n) for n in range(20000)]


def test_streams_that_are_not_the_interpreters_are_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    from nanochat.common import console

    before = sys.stdout, sys.stderr
    console.install()
    assert (sys.stdout, sys.stderr) == before
    assert console.trouble() is None
    assert not console.reader_is_gone()
