"""Kill a process before each of its operations on files, and write down their order.

Python reports open, rename, remove and mkdir to audit hooks; fsync and the writes of safetensors, which are
not reported, are wrapped. A hook cannot be taken away again, so everything happens in forked children.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanochat.checkpoint import format as checkpoint_format

WATCHED = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree"}


def _watch(note: Callable[[str, str], None]) -> None:
    """Call note(operation, path) before every operation of this process that changes files."""
    busy = [False]

    def tell(name: str, path: Any) -> None:
        if not busy[0]:
            busy[0] = True
            note(name, os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else str(path))
            busy[0] = False

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event not in WATCHED:
            return
        if event == "open":
            writes = isinstance(args[1], str) and set(args[1]) & set("wax+")
            if writes:
                tell("open", args[0])
        elif event == "os.rename":
            tell("rename", f"{os.fsdecode(args[0])} -> {os.fsdecode(args[1])}")
        else:
            tell(event, args[0])

    real_fsync, real_save = os.fsync, checkpoint_format.save_file

    def fsync(fd: int) -> None:
        tell("fsync", Path(f"/proc/self/fd/{fd}").readlink())
        real_fsync(fd)

    def save_file(tensors: Any, path: Path, metadata: Any = None) -> None:
        tell("write", path)
        real_save(tensors, path, metadata)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])  # as far as a kill in the middle would have come
        tell("second half", path)
        path.write_bytes(whole)

    os.fsync, checkpoint_format.save_file = fsync, save_file
    sys.addaudithook(hook)


def _child(action: Callable[[], Any], note: Callable[[str, str], None]) -> int:
    """Run action in a fork in which note is called before each operation; returns its wait status."""
    pid = os.fork()
    if pid == 0:
        try:
            _watch(note)
            action()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitpid(pid, 0)[1]


def operations(action: Callable[[], Any]) -> list[tuple[str, str]]:
    """What action does to files, in order: (operation, path)."""
    read, write = os.pipe()
    status = _child(action, lambda name, path: os.write(write, f"{name}\t{path}\n".encode()) and None)
    os.close(write)
    with os.fdopen(read) as told:
        lines = told.read().splitlines()
    assert status == 0
    return [tuple(line.split("\t")) for line in lines]  # type: ignore[misc]


def killed_before(action: Callable[[], Any], n: int) -> None:
    """Run action in a process that is killed before its n-th operation."""
    count = [0]

    def note(name: str, path: str) -> None:
        count[0] += 1
        if count[0] > n:
            os.kill(os.getpid(), signal.SIGKILL)

    status = _child(action, note)
    assert os.WIFSIGNALED(status), f"operation {n} was not reached"
