"""This process as the system sees it."""

from __future__ import annotations

import datetime
import shlex
import subprocess
import sys
from pathlib import Path


def peak_memory_bytes() -> int:
    """Most memory this process has held; 0 where the system does not tell.

    Linux's VmHWM comes first: what getrusage calls the peak also counts the process that forked this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text("utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def provenance() -> dict[str, str | None]:
    """What ran, and when: the command, the commit of the code, the day.

    The commit ends in + where a file differs from it, and is None outside a git checkout.
    """
    command = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    root = Path(__file__).resolve().parents[2]
    commit = None
    if (root / ".git").exists():  # an installed package may lie in somebody else's repository
        try:
            done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=10)
            commit = done.stdout.strip() or None
        except (OSError, subprocess.TimeoutExpired):  # no git here, or a disk that does not answer
            pass
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return {"command": shlex.join(sys.orig_argv[1:]), "commit": commit, "date": today}
