"""Processes that believe they have an H100: torch plans and compiles for it, and computes nothing."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tests.conftest import REPO

SOURCE = Path(__file__).with_name("device.c")


def missing() -> str:
    """What this machine lacks to pretend, or ""."""
    if sys.platform != "linux":
        return "libraries are preloaded on Linux only"
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if importlib.util.find_spec("triton") is None:
        return "there is no triton, whose headers describe the device"
    return "" if shutil.which("cc") else "there is no C compiler"


@functools.cache
def headers() -> Path:
    """Triton's copy of CUDA's headers."""
    spec = importlib.util.find_spec("triton")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "backends" / "nvidia" / "include"


def build(folder: Path) -> dict[str, str]:
    """Compile the device into a folder; returns the environment of a process that has it."""
    folder.mkdir(parents=True, exist_ok=True)
    driver, runtime = folder / "libcuda.so.1", folder / "libpretended.so"
    command = [
        "cc",
        "-shared",
        "-fPIC",
        "-O1",
        "-w",
        f"-I{headers()}",
        "-o",
        str(driver),
        str(SOURCE),
        "-ldl",
    ]
    subprocess.run(command, check=True)
    shutil.copy(driver, runtime)
    shutil.copy(driver, folder / "libcuda.so")
    return {
        **os.environ,
        "LD_PRELOAD": str(runtime),
        "LD_LIBRARY_PATH": str(folder),
        "TRITON_LIBCUDA_PATH": str(folder),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "0",
    }


def probe(environment: dict[str, str], name: str, timeout: float = 280, /, **arguments: Any) -> Any:
    """The answer of a function of this folder, "module.function", in a process of its own with the device.

    It may take `timeout` seconds.
    """
    command = [sys.executable, "-m", "tests.gpuless.ask", name, json.dumps(arguments)]
    done = subprocess.run(
        command, env=environment, cwd=REPO, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    # python -m tests.gpuless.pretended FOLDER: prints "env" and the variables, to put before a command.
    made = build(Path(sys.argv[1]).absolute())
    print("env", *(f"{name}={value}" for name, value in made.items() if os.environ.get(name) != value))
