"""This process as the system sees it: its peak, its command, its commit; a GPU that torch cannot use."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanochat.common import machine
from nanochat.common.errors import UserError
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


# ------------------------------------------------------------------------------------------------------------
# A GPU that torch cannot use

CLOSED = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Sat Aug 19 01:15:15 UTC 2023\nGCC version: gcc 12\n"
)
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (dvs-builder)\n"


@pytest.fixture
def without_cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """This torch does not reach a GPU, and no tool lists one."""
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))


def root_with(folder: Path, driver: str, gpus: int = 1, words: str = CLOSED) -> Path:
    """A root of the files of a system that has this driver."""
    about = folder / "proc" / "driver" / "nvidia" / "version"
    about.parent.mkdir(parents=True)
    about.write_text(words.format(driver))
    (folder / "dev").mkdir()
    (folder / "dev" / "nvidiactl").touch()
    for gpu in range(gpus):
        (folder / "dev" / f"nvidia{gpu}").touch()
    return folder


@pytest.mark.parametrize(
    ("driver", "built_for", "words", "told", "untold"),
    [
        (
            "535.104.05",
            "13.2",
            CLOSED,
            "13.2, which needs 580 or newer. Install a torch>=2.9 for CUDA 12 (",
            "",
        ),
        ("570.86", "13.0", OPEN, "torch>=2.9 for CUDA 12 (", ""),
        (
            "470.57.02",
            "12.8",
            CLOSED,
            "needs 525 or newer. Install a driver of 580 or newer, or",
            "torch>=",
        ),
        ("580.65.06", None, OPEN, "is built without CUDA. Install a torch>=2.9 for CUDA 13 (", "a driver of"),
        ("535.104.05", None, CLOSED, "CUDA 12 (", "cannot use"),
        ("590.1", "13.2", CLOSED, "cannot use it: ", "Install"),
        ("580.65.06", "12.8", CLOSED, "nvidia-smi and CUDA_VISIBLE_DEVICES", "Install"),
    ],
)
@pytest.mark.parametrize("device_type", ["auto", "cuda"])
@pytest.mark.usefixtures("without_cuda")
def test_a_gpu_that_torch_cannot_use_is_an_error_with_a_remedy(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    driver: str,
    built_for: str | None,
    words: str,
    told: str,
    untold: str,
    device_type: str,
) -> None:
    root = root_with(tmp_path, driver, words=words)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    with pytest.raises(UserError) as caught:
        machine.detect_device(device_type, root=root)
    said = str(caught.value)
    assert said.startswith(f"--device-type={device_type}: there is a GPU with the NVIDIA driver {driver}, ")
    assert ", or take the CPU: --device-type=cpu, or for all commands CUDA_VISIBLE_DEVICES= in" in said
    assert told in said
    assert "\n" not in said
    assert not untold or untold not in said
    assert machine.detect_device("cpu", root=root).type == "cpu"


@pytest.mark.usefixtures("without_cuda")
def test_the_cpu_is_taken_where_no_gpu_is_given_to_us(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = "mps" if torch.backends.mps.is_available() else "cpu"
    assert machine.detect_device("auto", root=tmp_path).type == expected
    outside = root_with(tmp_path / "container", "535.104.05", gpus=0)  # it sees the driver of its host
    assert machine.detect_device("auto", root=outside).type == expected
    root = root_with(tmp_path / "machine", "535.104.05")
    for hidden in ("", "-1", "NoDevFiles"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert machine.detect_device("auto", root=root).type == expected
        with pytest.raises(UserError, match="--device-type=cuda: not available on this machine"):
            machine.detect_device("cuda", root=root)


@pytest.mark.usefixtures("without_cuda")
def test_a_command_says_in_one_line_that_the_driver_is_too_old(tmp_path: Path) -> None:
    if torch.version.cuda is None:
        pytest.skip("this torch is built without CUDA")
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 450.80.02\necho 450.80.02\n")
    smi.chmod(0o755)
    command = [sys.executable, "-m", "scripts.base_train", "--depth=2", "--dry-run"]
    done = subprocess.run(command, cwd=REPO, env=dict(os.environ), capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(
        "error: --device-type=auto: there is a GPU with the NVIDIA driver 450.80.02, "
    )
    assert torch.version.cuda in done.stderr


def test_segments_grow_unless_the_user_has_said_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA's allocator makes of it is asked in tests/gpuless."""
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    machine.grow_segments()
    assert "PYTORCH_ALLOC_CONF" not in os.environ
