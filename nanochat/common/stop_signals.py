"""Signals that ask a run to stop: the first is noted, a later one ends the process at once.

Signals are of the process, so whether one has come is too: whatever waits long asks `requested`.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from nanochat.common.errors import warn

# As a preemption, a person at the keyboard, a terminal that is closed, and a scheduler shortly before a limit
# send them. SIGQUIT (Ctrl-\) is left to end the process at once.
NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))
# Ctrl-C comes from the terminal and again from torchrun; schedulers repeat themselves: one request.
ECHO_S = 2.0
HEED_S = 5.0  # before there is anything to save: for Python to come out of what it does
STOPPED = 75  # exit code of a run that was stopped and saved: EX_TEMPFAIL, "try again"

_requested = threading.Event()
_has_work = threading.Event()  # something would be lost if the process ended now


class Stopped(Exception):
    """A signal came while something was measured or waited for: what there is of it so far is dropped.

    Raised on all ranks, or on none.
    """


class StoppedEarly(KeyboardInterrupt):
    """A signal came before there was anything to save."""


def requested() -> bool:
    """Whether a signal has asked this process to stop."""
    return _requested.is_set()


def keep_work() -> None:
    """From now on there is something to save: a signal is noted and waits for the end of the step."""
    _has_work.set()


@contextlib.contextmanager
def stop_signals(*, has_work: bool = True) -> Iterator[Callable[[], bool]]:
    """Within, a first signal only raises the flag that is yielded; within another, this one changes nothing.

    A second one ends the process at once, even where Python waits for another rank and runs no handler: the
    interpreter's own C handler writes the number to a socket that a thread reads. One that comes less than
    ECHO_S after another is its echo. SIGHUP stays ignored where it was, as nohup wants it.

    Args:
        has_work: without, a signal raises StoppedEarly wherever the program is, until `keep_work` is called;
            within an import, which others may catch and try again, it ends the process.
    """
    is_listening = signal.getsignal(signal.SIGTERM) is _note
    if threading.current_thread() is not threading.main_thread() or is_listening:
        yield requested
        return
    _requested.clear()
    (_has_work.set if has_work else _has_work.clear)()
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    listener = threading.Thread(target=_listen, args=(theirs,), name="signals", daemon=True)
    listener.start()
    hangup = getattr(signal, "SIGHUP", None)
    noted = [number for number in SIGNALS if number != hangup or signal.getsignal(number) != signal.SIG_IGN]
    handlers = {number: signal.signal(number, _note) for number in noted}
    wakeup = signal.set_wakeup_fd(ours.fileno(), warn_on_full_buffer=False)
    try:
        yield requested
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        ours.close()
        listener.join()
        theirs.close()


def leave(code: int) -> NoReturn:
    """End the process now, with all that was printed.

    The interpreter's way out would run for seconds with the signals' default actions back in place, in which
    an echo of a signal that was heeded would turn the exit code into its own.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def leave_early() -> NoReturn:
    """End the process, of which nothing is to be saved."""
    warn("stopped by a signal before the first step: there was nothing to save")
    leave(STOPPED)


def heeding_signals(work: Callable[[], str]) -> NoReturn:
    """Do the work of a command of training, and end the process with the exit code that says how it ended.

    Args:
        work: from the arguments to the report; returns the status of the run. It imports what it needs
            itself: signals are heard before libraries are loaded, which takes seconds.
    """
    with stop_signals(has_work=False):
        try:
            status = work()
        except BaseException:  # code that is not ours may make another error of StoppedEarly: Rust panics
            if requested() and not _has_work.is_set():
                leave_early()
            raise
        leave(STOPPED if status == "stopped" else 0)


def _note(number: int, frame: FrameType | None) -> None:
    _requested.set()
    if _has_work.is_set():
        return
    if _is_importing(frame):
        leave_early()
    raise StoppedEarly


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


def _listen(numbers: socket.socket) -> None:
    """Read the signals that come, until the socket is closed; act on those that cannot wait for Python."""
    last = math.inf
    while number := numbers.recv(1):
        if number[0] not in SIGNALS:
            continue
        now = time.monotonic()
        if now - last > ECHO_S:
            os._exit(128 + number[0])
        last = now
        if not _has_work.is_set():
            threading.Thread(target=_leave_where_blocked, name="signals-early", daemon=True).start()


def _leave_where_blocked() -> None:
    """Python is in C, and nothing would be lost: do not let the scheduler's patience run out."""
    time.sleep(HEED_S)
    if not _has_work.is_set():
        os._exit(STOPPED)
