"""Locks with an owner: of several processes that want one thing on the disk, one has it, the others know who.

Two trainers of one run erase each other's metrics, and two downloads of one file mix their bytes. The lock is
a file that names its owner and that the system holds for the process (flock), so a killed owner frees it.
Some shared disks have no flock, or one that ends at the machine: so the owner also renews the time of the
file, and a file of another machine that was renewed a moment ago is respected whatever flock says.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from nanochat.common import files
from nanochat.common.errors import UserError

BEAT_S = 2.0  # between renewals
STALE_S = 30.0  # without one, by the clock of the disk: the owner is dead
POLL_S = 0.2
SETTLE_S = 1.0  # without flock: the last of those who claim at one moment has it
NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)


@dataclass(frozen=True)
class Owner:
    """Which process has a lock.

    Attributes:
        host: name of its machine, for people.
        machine: what no other machine has: the id of the boot, which containers of one machine share.
        namespace: in which its process id means something.
        pid: process id.
        since: when it took the lock.
        command: what it was started as.
    """

    host: str
    machine: str
    namespace: str
    pid: int
    since: str
    command: str

    @staticmethod
    def this_process() -> Owner:
        """The process that asks."""
        machine, namespace = files.machine()
        now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
        host = socket.gethostname()
        return Owner(host, machine, namespace, os.getpid(), now, shlex.join(sys.orig_argv[1:])[:500])

    def is_of_here(self) -> bool:
        """Whether its process is one of this machine, where flock tells the truth wherever it is."""
        return self.machine == files.machine()[0]

    def is_gone(self) -> bool:
        """Whether its process has certainly ended: only where its process id is one of ours."""
        return (self.machine, self.namespace) == files.machine() and not files.is_alive(self.pid)

    def __str__(self) -> str:
        """For a message."""
        return f"process {self.pid} on host {self.host} since {self.since} ({ascii(self.command)})"


@contextlib.contextmanager
def held(path: Path, what: str, remedy: str = "", *, wait: bool = False) -> Iterator[None]:
    """Within, this process alone holds the lock at `path`; kill -9 frees it too.

    Who waits for a thing to be made has to look, once it holds the lock, whether the one before has made it.

    Args:
        path: the lock's file, beside what it guards; it is there while the lock is held.
        what: is locked: "run 'd12'", for the message.
        remedy: what a person can do who is refused.
        wait: until the owner has ended, saying so once, where others are refused.

    Raises:
        UserError: another process holds it, and we are not to wait.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    told = False
    while isinstance(taken := _take(path), str):
        if not wait:
            raise UserError(f"{what} is in use by {taken}. {remedy or 'Wait for its end, or stop it.'}")
        if not told:
            print(f"{what} is in use by {taken}: waiting for its end", flush=True)
            told = True
        time.sleep(POLL_S)
    try:
        with renewed(taken, BEAT_S):
            yield
    finally:
        with contextlib.suppress(OSError):
            if _is_at(path, taken):
                path.unlink()  # while it is locked: whoever has it open finds another file at the name
        os.close(taken)


@contextlib.contextmanager
def renewed(target: Path | int, every_s: float) -> Iterator[None]:
    """Within, a thread renews the time of a file or folder: who looks at it sees that its owner lives."""
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(every_s):
            with contextlib.suppress(OSError):
                os.utime(target)

    thread = threading.Thread(target=renew, name="renewal", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _take(path: Path) -> int | str:
    """The descriptor of the lock's file, held and with our name in it; or who has it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            locked, owner = _flock(descriptor), _read(descriptor)
            if locked is False:
                return str(owner or "another process")
            if not _is_at(path, descriptor):
                continue  # the owner before has ended and has taken the file with it
            if owner is not None and not (locked and owner.is_of_here()) and _is_renewed(path, owner):
                return str(owner)
            if not locked:
                return _claim(path)
            _sign(descriptor)
            return os.dup(descriptor)
        finally:
            os.close(descriptor)


def _flock(descriptor: int) -> bool | None:
    """Whether the system gives us the lock; None where it has none for this file."""
    try:
        import fcntl  # not on Windows
    except ImportError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in NO_FLOCK:
            return None
        raise
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file is the one at `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _is_renewed(path: Path, owner: Owner) -> bool:
    """Whether an owner that flock does not tell of lives: until its file is old, we wait for a renewal."""
    before = path.stat().st_mtime
    while not owner.is_gone() and files.disk_time(path.parent) - before < STALE_S:
        time.sleep(POLL_S)
        try:
            if path.stat().st_mtime != before:
                return True
        except FileNotFoundError:  # it has ended meanwhile
            return False
    return False


def _claim(path: Path) -> int | str:
    """Put a file with our name at `path`, and see whether it is still ours a moment later."""
    temporary = files.temporary(path)
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    _sign(descriptor)
    temporary.replace(path)
    time.sleep(SETTLE_S)
    if _is_at(path, descriptor):
        return descriptor
    os.close(descriptor)
    return "another process"


def _sign(descriptor: int) -> None:
    """Write who we are. A full disk costs the name, not the lock."""
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(asdict(Owner.this_process())).encode(), 0)


def _read(descriptor: int) -> Owner | None:
    """The owner that the file names; None for a file that names none."""
    try:
        value = json.loads(os.pread(descriptor, 1 << 16, 0))
        pid = int(value.pop("pid"))
        return Owner(pid=pid, **{str(name): str(text) for name, text in value.items()})
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return None
