"""Processes of a training command that start at once: forked from a server that has imported everything.

Three quarters of what a short run takes is the import of its libraries. From there on a fork is a process
like any other: it has its own session, its signals, its descriptors, and its end. Where the import itself is
to be met, start the command instead.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from tests.conftest import REPO
from tests.reliability.figures import Figure


class Warm:
    """A process of a command; asked as one of subprocess is."""

    def __init__(self, server: WarmServer, pid: int) -> None:
        """The server is the parent, and so the one that is told of the end."""
        self._server, self.pid = server, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        if self.returncode is None:
            self.returncode = self._server.ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float = 600) -> int:
        """The exit code, when there is one.

        Raises:
            TimeoutExpired: there is none in time.
        """
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("base_train", timeout)
            time.sleep(0.005)
        return code


class WarmServer:
    """Starts them. Use as a context manager."""

    def __enter__(self) -> WarmServer:
        """Import everything."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.reliability.warm"],
            cwd=REPO,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        """End; what was started and runs still is left to who started it."""
        self._process.communicate()

    def ask(self, request: dict[str, Any]) -> Any:
        """One question, one answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, flags: list[str], log: Path, command: str = "base_train") -> Warm:
        """Start base_train, or another command; what it prints goes to the log."""
        about = {"flags": flags, "log": str(log), "environment": dict(os.environ), "command": command}
        return Warm(self, self.ask(about))


def resume_through_kills(flags: list[str], folder: Path, command: str, tried: Figure) -> None:
    """Start a command 20 times, each time until a SIGKILL at a random moment, and then once to its end.

    Args:
        flags: with --resume=auto.
        folder: for the logs.
        command: the name of its script.
        tried: has a trial for each start that is to be killed.
    """
    rng = random.Random(0)
    with WarmServer() as server:
        for number in range(20):
            with tried.trial(number):
                process = server.start(flags, folder / f"{number}.log", command)
                time.sleep(rng.uniform(0.2, 2.5))
                code = process.poll()
                if code is None:
                    os.kill(process.pid, signal.SIGKILL)
                    process.wait()
                else:
                    assert code == 0, (folder / f"{number}.log").read_text()
        assert server.start(flags, folder / "end.log", command).wait() == 0


def _become(request: dict[str, Any]) -> None:
    """In the fork: run the command as `python -m scripts.base_train` does, and leave with its exit code."""
    main = importlib.import_module(f"scripts.{request['command']}").main
    os.setsid()
    os.environ.clear()
    os.environ.update(request["environment"])
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    sys.argv = [request["command"], *request["flags"]]
    code = 0
    try:
        main()
    except SystemExit as left:
        code = int(left.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _serve() -> None:
    import scripts.base_train

    assert scripts.base_train
    import nanochat.chat.rl
    import nanochat.chat.sft

    assert nanochat.chat.rl
    assert nanochat.chat.sft
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                _become(request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
