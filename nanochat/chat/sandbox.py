"""Sandbox: judges a program that a model wrote by the tests of a data set, in bubblewrap, or not at all.

The program and its tests run in two sandboxes that see nothing of each other. The tests call a function of
the program by a line on a pipe, and what comes back is read as a literal; so the program can give answers,
and nothing else. That the tests passed is said by a random nonce which the program's sandbox never holds:
neither an exit code, nor output, nor objects that are equal to everything can stand for it.

Promised, as long as Linux keeps its namespaces: no network, no other process, no file but the interpreter's,
/usr and an empty /tmp of 16 MiB, and bounds on time, memory and output. Not promised: protection from faults
of the kernel. Therefore it is for the answers of one's own model, never for strangers' code.
"""

from __future__ import annotations

import os
import platform
import secrets
import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

EMPTY = "/tmp"  # noqa: S108  # of the sandbox, nobody else's
WALL_SECONDS = 8.0
MAX_TEXT = 100_000  # bytes of an argument of a command; the kernel takes 131,072

# A limit once lowered cannot be raised again.
LIMITS = """
import ast, builtins, io, resource, sys
for name, most in dict(CPU=5, AS=1 << 29, FSIZE=1 << 20, NOFILE=64, NPROC=16, CORE=0).items():
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
given = ast.literal_eval(sys.argv[1])
asked, answers = sys.stdin, sys.stdout
"""

PROGRAM = (
    LIMITS
    + """
sys.stdin, sys.stdout = io.StringIO(), sys.stderr
def plain(value):  # subclasses of what a literal can be, as such
    if isinstance(value, dict):
        return {plain(key): plain(inner) for key, inner in value.items()}
    for kind in (list, tuple, set):
        if isinstance(value, kind):
            return kind(map(plain, value))
    return value
names = {"__name__": "program"}
exec(given, names)
for line in asked:
    name, args, kwargs = ast.literal_eval(line)
    print(ascii(plain(names[name](*args, **kwargs))), file=answers, flush=True)
"""
)

TESTS = (
    LIMITS
    + """
nonce, tests, entry_point = given
class Names(dict):  # of the tests; one that is neither theirs nor Python's is a function of the program
    def __missing__(self, name):
        def ask(*args, **kwargs):
            print(ascii((name, args, kwargs)), file=answers, flush=True)
            if not (line := asked.readline(1 << 20)):
                raise EOFError("the program has ended")
            return ast.literal_eval(line)
        return getattr(builtins, name) if hasattr(builtins, name) else ask
names = Names(__name__="tests")
try:
    exec(tests, names)
    names["check"](names[entry_point])
except BaseException as error:
    sys.exit(f"{type(error).__name__}: {error}"[:400])
sys.stderr.write(nonce)
"""
)

# Of seccomp's filter, by machine: its mark, and the numbers of clone, fork, vfork, clone3, ptrace, unshare,
# setns, mount, socket, socketpair, shmget, bpf, perf_event_open, userfaultfd, io_uring_setup, add_key,
# request_key, keyctl, process_vm_readv and process_vm_writev (arm64 has no fork and vfork). Limits do not do:
# root has none on processes, shared memory that is not attached counts for none, vsock is in no namespace.
DENIED = {
    "x86_64": (
        0xC000003E,
        (56, 57, 58, 435, 101, 272, 308, 165, 41, 53, 29, 321, 298, 323, 425, 248, 249, 250, 310, 311),
    ),
    "aarch64": (
        0xC00000B7,
        (220, 435, 117, 97, 268, 40, 198, 199, 194, 280, 241, 282, 425, 217, 218, 219, 270, 271),
    ),
}
LOAD, EQUAL, AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
KILL, REFUSE, ALLOW = 0x80000000, 0x00050001, 0x7FFF0000


@dataclass(frozen=True)
class Outcome:
    """How the tests of a program ended.

    Attributes:
        passed: whether the tests came to their end.
        said: the error that ended them otherwise, or what bubblewrap says, if anything.
    """

    passed: bool
    said: str


def probe() -> str | None:
    """Why no program can be judged here, or None: bubblewrap is tried, as it may be there and forbidden."""
    if platform.machine() not in DENIED or shutil.which("bwrap") is None:
        return "it needs Linux on x86-64 or arm64, and bubblewrap (apt-get install bubblewrap)"
    outcome = run("def one(): return 1", "def check(one): assert one() == 1", "one")
    return None if outcome.passed else f"bubblewrap does not work here: {outcome.said}"


def run(program: str, tests: str, entry_point: str) -> Outcome:
    """Judge a program: its function is called by the tests, whose values may be all that literals are.

    Args:
        program: Python; nothing is expected of it.
        tests: Python that defines check(candidate). A name that they do not define is the program's.
        entry_point: name of the function that check gets.
    """
    nonce = secrets.token_hex(16)
    texts = ascii(program), ascii((nonce, tests, entry_point))
    if max(map(len, texts)) > MAX_TEXT:
        return Outcome(False, f"more than {MAX_TEXT} bytes")
    (asked, asks), (answered, answers) = os.pipe(), os.pipe()
    solver = _start(PROGRAM, texts[0], asked, answers, subprocess.DEVNULL)
    tester = _start(TESTS, texts[1], answered, asks, subprocess.PIPE)
    for end in (asked, asks, answered, answers):
        os.close(end)
    try:
        said = tester.communicate(timeout=WALL_SECONDS)[1].decode("utf-8", "replace")
    except subprocess.TimeoutExpired:
        said = f"not done after {WALL_SECONDS} s"
    finally:
        for process in (solver, tester):
            process.kill()
            process.communicate()
    return Outcome(said.endswith(nonce), said)


def _start(harness: str, text: str, stdin: int, stdout: int, stderr: int) -> subprocess.Popen[bytes]:
    """Begin a Python in a sandbox of its own."""
    python = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    prefix = sys.base_prefix
    command = ["bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--clearenv"]
    command += ["--cap-drop", "ALL", "--ro-bind", "/usr", "/usr", "--ro-bind", prefix, prefix]
    command += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    for link in ("/lib", "/lib64"):
        command += ["--ro-bind-try", link, link]
    command += ["--size", str(1 << 24), "--tmpfs", EMPTY, "--remount-ro", "/", "--chdir", EMPTY]
    kept, filled = os.pipe()
    os.write(filled, _filter())
    os.close(filled)
    command += ["--seccomp", str(kept), str(python), "-ISB", "-Wignore", "-c", harness, text]
    try:
        return subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=stderr, pass_fds=(kept,))
    finally:
        os.close(kept)


def _filter() -> bytes:
    """Seccomp's program (BPF): system calls of another machine end the process, those in DENIED fail."""
    mark, denied = DENIED[platform.machine()]
    steps = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, mark), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    steps += [(AT_LEAST, 0, 1, 1 << 30), (RETURN, 0, 0, KILL)]  # x86-64's second numbering
    for number in denied:
        steps += [(EQUAL, 0, 1, number), (RETURN, 0, 0, REFUSE)]
    return b"".join(struct.pack("HBBI", *step) for step in [*steps, (RETURN, 0, 0, ALLOW)])
