"""Signals: the first is noted, and its echo; a second one ends the process even where no handler runs."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from nanochat.stopping import ECHO_S, SIGNALS, stop_signals
from tests.conftest import REPO

# Says when it is ready, then blocks where no handler runs: waiting for another thread's lock in C.
BLOCKED = """
import threading
from nanochat.stopping import stop_signals
with stop_signals():
    print("ready", flush=True)
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    lock = threading.Lock()
    lock.acquire()
    while True:
        lock.acquire()
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_a_first_signal_raises_the_flag_and_nothing_else(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_signals() as stop_requested:
        assert not stop_requested()
        signal.raise_signal(number)
        assert stop_requested()
        signal.raise_signal(number)  # an echo
    assert signal.getsignal(number) is before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_second_signal_ends_at_once_a_process_that_is_blocked() -> None:
    process = subprocess.Popen([sys.executable, "-c", BLOCKED], cwd=REPO, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        for _ in range(2):  # the request and its echo
            process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
        assert process.poll() is None
        time.sleep(ECHO_S)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 128 + signal.SIGINT
    finally:
        process.kill()
        process.wait()
