"""Signals: the first is noted, and its echo; a second one ends the process even where no handler runs."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest

from nanochat.common import stop_signals as signals_module
from nanochat.common.stop_signals import (
    ECHO_S,
    SIGNALS,
    STOPPED,
    StoppedEarly,
    keep_work,
    requested,
    stop_signals,
)
from nanochat.data import pending_download, row_stream
from nanochat.data.row_stream import RowStream
from tests.conftest import REPO

# Says when it is ready, then blocks where no handler runs: waiting for another thread's lock in C.
BLOCKED = """
import threading
from nanochat.common.stop_signals import stop_signals
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


def test_a_stop_before_there_is_work_ends_at_once_where_the_program_is() -> None:
    with stop_signals(has_work=False) as stop_requested:
        with pytest.raises(StoppedEarly):
            signal.raise_signal(signal.SIGTERM)
        assert stop_requested()
    with stop_signals(has_work=False):
        assert not requested()  # the one before has ended
        keep_work()
        signal.raise_signal(signal.SIGTERM)
        assert requested()


def test_within_another_nothing_changes() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_signals() as outer:
        handler = signal.getsignal(signal.SIGTERM)
        with stop_signals() as inner:
            signal.raise_signal(signal.SIGTERM)
            assert inner()
        assert signal.getsignal(signal.SIGTERM) is handler
        assert outer()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_hangup_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals() as stop_requested:
            signal.raise_signal(signal.SIGHUP)
            assert not stop_requested()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_in_a_thread_the_process_is_asked_and_nothing_installed() -> None:
    asked: list[bool] = []

    def work() -> None:
        with stop_signals() as stop_requested:
            asked.append(stop_requested())

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(asked) == 1
    assert signal.getsignal(signal.SIGTERM) is before


# Blocked in C before there is anything to save.
EARLY = """
import threading
from nanochat.common import stop_signals as signals_module
signals_module.HEED_S = 0.2
lock = threading.Lock()
lock.acquire()
with signals_module.stop_signals(has_work=False):
    while True:
        try:
            print("ready", flush=True)
            while True:
                lock.acquire()
        except signals_module.StoppedEarly:
            pass
"""


def test_a_stop_before_there_is_work_is_heeded_by_a_process_that_is_blocked() -> None:
    process = subprocess.Popen([sys.executable, "-c", EARLY], cwd=REPO, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == STOPPED
    finally:
        process.kill()
        process.wait()


# What imports may catch it and import again: numpy does, and cannot be imported twice.
IMPORTING = """
import sys
from nanochat.common import stop_signals as signals_module
sys.path.insert(0, sys.argv[1])
with signals_module.stop_signals(has_work=False):
    try:
        import slow_module
    except BaseException:
        print("caught", flush=True)
"""


def test_a_stop_in_an_import_is_caught_by_nobody(tmp_path: Path) -> None:
    (tmp_path / "slow_module.py").write_text("import time; print('ready', flush=True); time.sleep(60)")
    process = subprocess.Popen(
        [sys.executable, "-c", IMPORTING, str(tmp_path)],
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    out, told = process.communicate(timeout=30)
    assert (process.returncode, out) == (STOPPED, "")
    assert told.startswith("warning: stopped by a signal before the first step")
    assert told.count("\n") == 1


def test_a_loader_that_waits_hears_the_stop_and_draws_nothing() -> None:
    stream = RowStream(lambda epoch, position: Future(), 3)
    stream.move((1, 2, 5))
    asked = iter([False, False, True])
    poll_s, row_stream.POLL_S = row_stream.POLL_S, 0.01
    try:
        with pytest.raises(signals_module.Stopped):
            stream.take(4, lambda: next(asked))
    finally:
        row_stream.POLL_S = poll_s
    assert stream.cursor == (1, 2, 5)


def test_whoever_waits_for_a_shard_hears_the_stop(tmp_path: Path) -> None:
    (tmp_path / ".tmp-fetch.1").mkdir()  # a download that lives
    with stop_signals():
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(signals_module.Stopped):
            pending_download.wait_for(tmp_path / "shard_00001.parquet")


def test_an_early_signal_that_other_code_makes_another_error_of_ends_the_run_as_one() -> None:
    program = """
import os, signal
from nanochat.common.stop_signals import heeding_signals

def work():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        sum(range(10**8))
    except KeyboardInterrupt as interrupt:  # as what is written in Rust does
        raise BaseException("panic") from interrupt

heeding_signals(work)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == STOPPED, done.stderr
    assert done.stderr.splitlines() == [
        "warning: stopped by a signal before the first step: there was nothing to save"
    ]
