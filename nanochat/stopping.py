"""Signals that ask a run to stop: the first is noted, a second one ends the process at once."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

# As a preemption, a person at the keyboard, and a scheduler shortly before the time limit send them.
SIGNALS = (signal.SIGTERM, signal.SIGINT, *((signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ()))
ECHO_S = 2.0  # Ctrl-C reaches the workers from the terminal and again from torchrun: one request, not two
STOPPED = 75  # exit code of a run that was stopped and saved: EX_TEMPFAIL, "try again"


class Stopped(Exception):
    """A signal came while something was measured between two steps: what was measured so far is dropped.

    Raised on all ranks, or on none.
    """


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Within, a first SIGTERM, SIGINT or SIGUSR1 only raises the flag that is yielded.

    A second one, ECHO_S later or more, ends the process at once, even where Python waits for another rank and
    runs no handler: the interpreter's own C handler writes the number to a socket that a thread reads.
    """
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    stop = threading.Event()

    def listen() -> None:
        first = math.inf
        while number := theirs.recv(1):
            if number[0] in SIGNALS:
                first = min(first, time.monotonic())
                if time.monotonic() - first > ECHO_S:
                    os._exit(128 + number[0])

    listener = threading.Thread(target=listen, name="signals", daemon=True)
    listener.start()
    handlers: dict[int, Any] = {number: signal.signal(number, lambda *_: stop.set()) for number in SIGNALS}
    wakeup = signal.set_wakeup_fd(ours.fileno(), warn_on_full_buffer=False)
    try:
        yield stop.is_set
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        ours.close()
        listener.join()
        theirs.close()
