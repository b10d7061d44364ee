"""The sandbox: what it judges rightly, and programs that try to pass, to get out, or to do harm."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nanochat.chat import sandbox
from tests.conftest import REPO


@pytest.fixture(scope="module")
def bwrap() -> None:
    if reason := sandbox.probe():
        pytest.skip(f"no sandbox: {reason}")


CHECK = "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(5) == 25\n"


def passes(program: str, tests: str = CHECK, entry_point: str = "square") -> bool:
    return sandbox.run(program, tests, entry_point).passed


def test_without_bubblewrap_it_says_so_and_nothing_is_run(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "apt-get install bubblewrap" in str(sandbox.probe())


def test_where_bubblewrap_is_forbidden_it_says_what_bubblewrap_says(monkeypatch, tmp_path):
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho bwrap: No permissions to create new namespace >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(sandbox.platform, "machine", lambda: "x86_64")
    assert "No permissions to create new namespace" in str(sandbox.probe())


RIGHT = "def square(x):\n    return x * x\n"


@pytest.mark.usefixtures("bwrap")
@pytest.mark.parametrize(
    ("program", "tests"),
    [
        (RIGHT, CHECK),
        ("print('noise')\nimport sys\nprint(sys.stdin.read())\n" + RIGHT, CHECK),
        ("try:\n    input()\nexcept EOFError:\n    pass\n" + RIGHT, CHECK),
        (
            "from collections import Counter\n"
            "def square(x): return [Counter('ab'), (1, {2}), None, 'e\u00e9\\0', 0.1]",
            "def check(f): assert f(1) == [{'a': 1, 'b': 1}, (1, {2}), None, 'e\u00e9\\0', 0.1]",
        ),
        (  # a test that uses another function of the program, and Python's own
            "def double(x): return 2 * x\ndef abs(x): return 0\ndef square(x, *, by): return x * by",
            "import math\ndef check(f):\n    assert math.fabs(abs(f(-2, by=3))) == double(3)",
        ),
        ("import os\nwith open('mine', 'w') as f: f.write('x')\n" + RIGHT, CHECK),
    ],
)
def test_a_right_program_passes(program, tests):
    assert sandbox.run(program, tests, "square").passed


WRONG = {
    "wrong": "def square(x): return 2 * x",
    "no function": "x = 1",
    "no Python": "def square(x) return x",
    "NUL": "def square(x): return x * x\n\0",
    "surrogate": "def square(x): return '\ud800'",
    "raises": "def square(x): raise ValueError",
    "recursion": "def square(x): return square(x)",
    "no literal": "def square(x): return object()",
    "huge answer": "def square(x): return 'x' * (1 << 21)",
    "too long": RIGHT + "#" * (1 << 17),
}

# Programs that do not compute the square and want to pass.
CHEATS = {
    "SystemExit(0)": "raise SystemExit(0)",
    "exit in the function": "def square(x): raise SystemExit(0)",
    "os._exit(0)": "import os\nos._exit(0)",
    "os._exit(0) in the function": "import os\ndef square(x): os._exit(0)",
    "kill the parent": "import os\nos.kill(os.getppid(), 9)",
    "equal to everything": (
        "class Any(int):\n    def __eq__(self, other): return True\ndef square(x): return Any(1)"
    ),
    "repr of everything": (
        "class Any:\n    def __repr__(self): return 'Any()'\n    def __eq__(self, other): return True\n"
        "def square(x): return Any()"
    ),
    "check that passes": "def check(candidate): pass\ndef square(x): return 1",
    "builtins that pass": (
        "import builtins\nbuiltins.AssertionError = type('E', (Exception,), {})\n"
        "builtins.ascii = lambda x: '4'\ndef square(x): return 1"
    ),
    "write to every descriptor": (
        "import os\nfor fd in range(3, 64):\n    try:\n        os.write(fd, b'0' * 32)\n"
        "    except OSError:\n        pass\nos._exit(0)"
    ),
    "nonce in argv": (
        "import sys\nfor text in sys.argv + [str(vars(sys))]:\n    print(text, file=sys.stderr, flush=True)\n"
        "def square(x): return 1"
    ),
    "nonce in frames and gc": (
        "import gc, sys, re\nseen = ' '.join(map(repr, gc.get_objects()))\nframe = sys._getframe()\n"
        "while frame:\n    seen += repr(frame.f_locals) + repr(frame.f_globals)\n    frame = frame.f_back\n"
        "for text in re.findall('[0-9a-f]{32}', seen):\n    sys.stderr.write(text)\n"
        "    sys.__stdout__.write(text)\nsys.__stdout__.flush()\ndef square(x): return 1"
    ),
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\ndef square(x): return 1",
    "an answer that is no literal": (
        "import os\nos.write(1, b'__import__(\"os\")._exit(0)\\n' * 9)\ndef square(x): return 1"
    ),
}


@pytest.mark.usefixtures("bwrap")
@pytest.mark.parametrize("name", [*WRONG, *CHEATS])
def test_a_program_that_does_not_compute_it_does_not_pass(name):
    assert not passes({**WRONG, **CHEATS}[name])


# Programs that return 4 and 25, and so pass, if what they try first succeeds.
ESCAPES = {
    "network": ("import socket\ns = socket.create_connection(('127.0.0.1', PORT), 2)\ns.sendall(b'x')"),
    "raw socket call": "import ctypes\nif ctypes.CDLL(None).syscall(SOCKET, 2, 1, 0) < 0: raise OSError",
    "abstract unix socket": "import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect('\\0nanochat-test')",
    "read the repository": "open('REPO/pyproject.toml').read()",
    "list home": "import os\nassert os.listdir(os.path.dirname('REPO'))",
    "read the shadow file": "open('/etc/shadow').read()",
    "read the password file": "open('/etc/passwd').read()",
    "read through a symlink": "import os\nos.symlink('REPO/pyproject.toml', 'link')\nopen('link').read()",
    "processes of others": "import os\nassert any(name.isdigit() for name in os.listdir('/proc'))",
    "kill a process of others": "import os\nos.kill(VICTIM, 9)",
    "write to usr": "open('/usr/owned', 'w').write('x')",
    "write to the root": "open('/owned', 'w').write('x')",
    "write to the interpreter": "import sys\nopen(sys.base_prefix + '/owned', 'w').write('x')",
    "fork": "import os\nif os.fork() == 0: os._exit(0)",
    "fork bomb": "import os\nwhile True: os.fork()",
    "clone by number": (
        "import ctypes\nif ctypes.CDLL(None).syscall(CLONE, 17, 0, 0, 0, 0) < 0: raise OSError"
    ),
    "grandchild": (
        "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(9)'])"
    ),
    "another program": "import os\nif os.system('true') != 0: raise OSError",
    "1 GB of memory": "x = bytearray(1 << 30)\nx[::4096] = b'x' * len(x[::4096])",
    "1 GB of memory in a map": "import mmap\nx = mmap.mmap(-1, 1 << 30)\nx[0] = 1",
    "1 GB of shared memory": (
        "import ctypes\nlibc = ctypes.CDLL(None)\nlibc.shmat.restype = ctypes.c_void_p\nfor _ in range(4):\n"
        "    segment = libc.shmget(0, 1 << 28, 0o1600)\n    if segment < 0: raise OSError\n"
        "    place = libc.shmat(segment, None, 0)\n    ctypes.memset(place, 1, 1 << 28)\n"
        "    libc.shmdt(ctypes.c_void_p(place))"
    ),
    "1 GB of files in memory": (
        "import os\nfor i in range(1024):\n    file = os.memfd_create(str(i))\n"
        "    os.write(file, b'x' * (1 << 20))"
    ),
    "1 GB of output": (
        "import os\nfor _ in range(1 << 14): os.write(2, b'x' * (1 << 16))\n"
        "while True: os.write(1, b'x' * (1 << 16))"
    ),
    "a large file": "open('large', 'wb').write(b'x' * (1 << 22))",
    "1 GB of files": "for i in range(1024): open(f'f{i}', 'wb').write(b'x' * (1 << 20))",
    "raise the limits": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 34, 1 << 34))",
    "processor time": "while True: pass",
    "sleep": "import time\ntime.sleep(60)",
    "ptrace": "import ctypes\nif ctypes.CDLL(None).ptrace(0, 0, 0, 0) < 0: raise OSError",
    "namespace": "import ctypes\nif ctypes.CDLL(None).unshare(0x10000000) < 0: raise OSError",
    "mount": "import ctypes\nif ctypes.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, None) < 0: raise OSError",
    "chroot": "import os\nos.chroot('/tmp')",
    "become root": "import os\nos.setuid(12345)",
    "device": "import os\nos.mknod('disk', 0o60600, os.makedev(8, 0))\nopen('disk', 'rb').read(1)",
    "kernel setting": "open('/proc/sys/kernel/core_pattern', 'w').write('x')",
    "environment": "import os\nassert os.environ.get('HOME') or os.environ.get('SECRET')",
    "descriptors of others": "import os\nassert os.listdir('/proc/1/fd')",
    "an open descriptor": (
        "import os\nfor fd in range(3, 64):\n    try:\n        os.fstat(fd)\n        break\n"
        "    except OSError:\n        pass\nelse: raise OSError"
    ),
    "device memory": "open('/dev/mem', 'rb').read(1)",
    "the terminal": "open('/dev/tty', 'w').write('x')",
}


# Those that do no harm where they succeed: outside of the sandbox all of them do.
HARMLESS = (
    *("network", "raw socket call", "abstract unix socket", "read the repository", "list home"),
    *("read the password file", "read through a symlink", "processes of others", "fork", "clone by number"),
    *("grandchild", "another program", "1 GB of memory", "1 GB of memory in a map", "a large file", "ptrace"),
    "environment",
)

# What is known as a guard of such programs: limits, and some functions of os and subprocess taken away.
GUARD = """
import os, resource, shutil, subprocess
for name in ("AS", "DATA", "STACK"):
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (1 << 28, 1 << 28))
for name in "kill system putenv remove removedirs rmdir fchdir setuid fork forkpty killpg rename".split():
    setattr(os, name, None)
subprocess.Popen = shutil.rmtree = shutil.move = None
os.environ.pop("SECRET", None)
"""


@pytest.fixture
def attempts(tmp_path, monkeypatch):
    """The escapes, by name, where there is something to reach: a server, a process, files, a secret."""
    monkeypatch.setenv("SECRET", "x")
    monkeypatch.chdir(tmp_path)
    numbers = {"x86_64": ("41", "56"), "aarch64": ("198", "220")}[sandbox.platform.machine()]
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind("\0nanochat-test")
        abstract.listen(99)
        victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
        words = {"PORT": str(server.getsockname()[1]), "REPO": str(REPO), "VICTIM": str(victim.pid)}
        words |= {"SOCKET": numbers[0], "CLONE": numbers[1]}
        try:
            yield {
                name: re.sub("|".join(words), lambda m: words[m[0]], text) for name, text in ESCAPES.items()
            }
            assert victim.poll() is None
        finally:
            victim.kill()
            victim.wait()


def succeeds_alone(program: str) -> bool:
    none = subprocess.DEVNULL  # a grandchild would hold a pipe open
    return (
        subprocess.run([sys.executable, "-c", program], stdout=none, stderr=none, timeout=60).returncode == 0
    )


@pytest.mark.slow
@pytest.mark.usefixtures("bwrap")
def test_no_program_gets_out(attempts):
    """Each attempt passes if what it tries succeeds; of those that may be tried outside, all do there."""
    assert len(attempts) > 30
    begun = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        passed = pool.map(lambda attempt: passes(f"{attempt}\n{RIGHT}"), attempts.values())
        succeeded = [name for name, has in zip(attempts, passed, strict=True) if has]
    assert succeeded == []
    assert time.monotonic() - begun < len(attempts) * sandbox.WALL_SECONDS / 2
    assert [name for name in HARMLESS if not succeeds_alone(attempts[name])] == []


@pytest.mark.slow
def test_a_guard_within_the_process_lets_many_out(attempts):
    """The figure beside ours: the same attempts behind a guard of limits and functions taken away."""
    out = [name for name in HARMLESS if succeeds_alone(GUARD + attempts[name])]
    print(f"{len(out)} of {len(HARMLESS)} succeed: {', '.join(out)}")
    assert {"network", "read the repository", "clone by number", "ptrace"} <= set(out)


@pytest.mark.slow
@pytest.mark.usefixtures("bwrap")
def test_nothing_is_left_of_a_program(monkeypatch):
    """Neither processes nor descriptors, whether it ends, fails or is killed."""
    monkeypatch.setattr(sandbox, "WALL_SECONDS", 1.0)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for program in (RIGHT, "raise SystemExit(0)", "import time\ntime.sleep(60)"):
        passes(program)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    time.sleep(0.5)
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert "candidate(5) == 25" not in listed
