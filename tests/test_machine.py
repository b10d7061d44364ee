"""This process as the system sees it: its peak memory, its command, the commit of its code."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest

from nanochat.common import machine
from tests.conftest import REPO


def test_the_peak_is_of_this_process_and_in_bytes() -> None:
    code = (
        "from nanochat.common import machine\n"
        "before = machine.peak_memory_bytes()\n"
        "held = b'x' * (128 << 20)\n"
        "del held\n"
        "print(machine.peak_memory_bytes() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert 120e6 < int(done.stdout) < 200e6


def test_provenance_names_the_command_and_the_day() -> None:
    code = "from nanochat.common import machine; print(machine.provenance())"
    done = subprocess.run([sys.executable, "-c", code, "a b"], cwd=REPO, capture_output=True, text=True)
    assert "'a b'" in done.stdout
    assert re.search(r"'date': '20\d\d-\d\d-\d\d'", done.stdout)


def test_provenance_names_the_commit_of_a_checkout() -> None:
    if shutil.which("git") is None or not (REPO / ".git").exists():
        pytest.skip("not a git checkout")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPO, capture_output=True, text=True).stdout
    commit = machine.provenance()["commit"]
    assert commit is not None
    assert commit.removesuffix("+") == head[:12]
