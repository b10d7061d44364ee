"""P12, the archives' part: an evaluation bundle neither escapes nor explodes, at the two doors that read one.

The doors are `base_eval --eval-bundle X.zip`, which reads in place, and `core_download`, which installs the
files whose hashes it knows.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import shutil
import stat
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nanochat.common.errors import UserError
from nanochat.evaluation.core import bundle as core_bundle
from nanochat.evaluation.core import download, evaluate
from nanochat.evaluation.core.bundle import Example, Task
from tests.reliability.figures import Figure

TASKS = {
    "pets": ("schema", {"context_options": ["the cat", "a mat"], "continuation": "sat", "gold": 0}),
    "sums": ("multiple_choice", {"query": "one and one", "choices": ["two", "three"], "gold": 0}),
    "ends": ("language_modeling", {"context": "the cat sat on the", "continuation": "mat"}),
}
LIST = "icl_tasks:\n" + "".join(
    f"- {{label: {name}, dataset_uri: {name}.jsonl, num_fewshot: [1], icl_task_type: {kind}}}\n"
    for name, (kind, _) in TASKS.items()
)
TABLE = "Eval Task,Random baseline\npets,50\nsums,50\nends,0\n"
TEXTS = {"core.yaml": LIST, "eval_meta_data.csv": TABLE} | {
    f"eval_data/{name}.jsonl": "".join(json.dumps(record | {"id": i}) + "\n" for i in range(30))
    for name, (_, record) in TASKS.items()
}
MiB = 1 << 20

Suite = list[tuple[Task, list[Example]]]
Door = Callable[[Path], object]


def zipped(members: dict[str, str | bytes], method: int = zipfile.ZIP_DEFLATED, root: str = "b/") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(root + name, data)
    return buffer.getvalue()


def with_member(name: str, data: str | bytes, **how: int) -> bytes:
    return zipped(TEXTS | {name: data}, **how)


def entries(data: bytes, name: str) -> list[tuple[int, int]]:
    """Where the two headers of a member begin: in front of its bytes, and in the directory."""
    found = []
    for mark, size in ((b"PK\x03\x04", 30), (b"PK\x01\x02", 46)):
        at = -1
        while (at := data.find(mark, at + 1)) >= 0:
            if data[at + size :].startswith(name.encode()):
                found.append((at, size))
                break
    return found


def patched(data: bytes, name: str, local: int, form: str, value: int) -> bytes:
    """One field of both headers of a member overwritten; `local` is its place in the first."""
    damaged = bytearray(data)
    for at, size in entries(data, name):
        struct.pack_into(form, damaged, at + local + (2 if size == 46 else 0), value)
    return bytes(damaged)


def linked(name: str, target: str) -> bytes:
    buffer = io.BytesIO(zipped({key: text for key, text in TEXTS.items() if key != name}))
    info = zipfile.ZipInfo("b/" + name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr(info, target)
    return buffer.getvalue()


def twice(name: str) -> bytes:
    other = "x" * len(name)
    both = zipped({other: TEXTS[name]} | TEXTS)
    return both.replace(other.encode(), name.encode())


def encrypted(name: str) -> bytes:
    return patched(zipped(TEXTS), "b/" + name, 6, "<H", 1)


def directory_of(count: int) -> bytes:
    """A directory of so many members that are not there, before the real ones."""
    data = zipped(TEXTS)
    at = data.index(b"PK\x01\x02")
    size, fake = data.index(b"PK\x05\x06") - at, bytearray(data[at:][:46]) + b"x"
    struct.pack_into("<HHH", fake, 28, 1, 0, 0)
    end = bytearray(data[at + size :])
    struct.pack_into("<HHI", end, 8, count % 65536, count % 65536, size + count * len(fake))
    return data[:at] + bytes(fake) * count + data[at : at + size] + bytes(end)


PETS = "eval_data/pets.jsonl"
EXAMPLE = b'{"context_options": ["the cat", "a mat"], "continuation": "sat", "gold": 0}\n'


def claiming(size: int) -> bytes:
    return patched(with_member(PETS, bytes(24 * MiB)), "b/" + PETS, 22, "<I", size)


BOMBS: dict[str, Callable[[], bytes]] = {
    "whose headers claim 100 bytes": lambda: claiming(100),
    "whose headers claim what it may have": lambda: claiming(8_000_000),
    "that says its size": lambda: with_member(PETS, bytes(24 * MiB)),
    "of empty lines": lambda: with_member(PETS, b"\n" * (24 * MiB)),
    "of good examples": lambda: with_member(PETS, EXAMPLE * (MiB // 2)),
    "in the list of tasks": lambda: with_member("core.yaml", b"[1,2]," * (4 * MiB)),
    "in the table of baselines": lambda: with_member("eval_meta_data.csv", b"a,b\n" * (4 * MiB)),
    "packed by bzip2": lambda: with_member(PETS, bytes(24 * MiB), method=zipfile.ZIP_BZIP2),
    "packed by LZMA": lambda: with_member(PETS, bytes(24 * MiB), method=zipfile.ZIP_LZMA),
    "of 40,000 members": lambda: directory_of(40_000),
    "of as much YAML as may be": lambda: with_member("core.yaml", b"- a\n" * 16_000),
    "of lists that name each other": lambda: with_member("core.yaml", LAUGHS),
}
LAUGHS = (
    "a0: &a0 [x]\n"
    + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 30))
    + "icl_tasks: [{label: pets, icl_task_type: *a29}]\n"
)
HOSTILE = {
    "up": with_member("../evil", "x"),
    "up from below": zipped(TEXTS | {"a/../../../evil": "x"}),
    "absolute": zipped(TEXTS | {"/evil": "x"}, root=""),
    "drive": zipped(TEXTS | {"C:/evil": "x"}, root=""),
    "backslashes": with_member("..\\evil", "x"),
    "a link to a file": linked(PETS, "/etc/passwd"),
    "a link to a member": linked(PETS, "sums.jsonl"),
    "one name twice": twice(PETS),
    "encrypted": encrypted(PETS),
    "a folder in the place of a file": zipped(
        {k: v for k, v in TEXTS.items() if k != PETS} | {PETS + "/": ""}
    ),
    "an unknown method": patched(zipped(TEXTS), "b/" + PETS, 8, "<H", 99),
    "two lists of tasks": zipped(TEXTS | {"deeper/core.yaml": LIST}),
    "not a zip": b"PK\x03\x04 and so on",
    "empty": b"",
    "cut in the middle": zipped(TEXTS)[:900],
    "nested lists in YAML": with_member("core.yaml", "[" * 20_000),
    "a number of 5,000 digits in YAML": with_member("core.yaml", "icl_tasks: [" + "9" * 5000 + "]"),
    "a day that is none in YAML": with_member("core.yaml", "icl_tasks: 2026-02-31"),
    "a list of itself in YAML": with_member("core.yaml", "&a [*a]"),
    "nested lists in a line": with_member(PETS, "[" * 200_000 + "]" * 200_000),
    "a number of 5,000 digits in a line": with_member(PETS, '{"gold": ' + "9" * 5000 + "}"),
    "half of a pair in a line": with_member(
        PETS, '{"context_options": ["\\ud800"], "gold": 0, "continuation": "a"}'
    ),
    "bytes that are not UTF-8 in a line": with_member(PETS, b'{"context_options": ["\xff"]}'),
    "a quote without end in the table": with_member("eval_meta_data.csv", 'a,"' + "x" * 60_000),
    "a NUL in the table": with_member("eval_meta_data.csv", "Eval Task,Random baseline\npets\0,50\n"),
    "a million shots": with_member("core.yaml", LIST.replace("[1]", "[1000000]")),
}


def suite_of(path: Path) -> Suite:
    """What base_eval reads of a bundle before the first example is scored."""
    bundle = evaluate.find_bundle(str(path))
    return [(task, core_bundle.load_examples(bundle, task)) for task in core_bundle.load_tasks(bundle)]


def installed(path: Path) -> list[str]:
    """What core_download makes of a zip that has arrived."""
    folder = path.parent / "installed"
    download._unpack(path, folder)
    return download.differences(folder)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of this bundle are taken for the public one's."""
    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in TEXTS.items()}
    monkeypatch.setattr(download, "public_files", lambda: hashes)


def check(door: Door, path: Path, right: object) -> None:
    """The zip is read right or refused by name, and no half of it is left."""
    refused = ""
    try:
        assert door(path) == right
    except UserError as error:
        refused = str(error)
    left = [each.name for each in path.parent.iterdir() if each != path]
    shutil.rmtree(path.parent / "installed", ignore_errors=True)
    if refused:
        assert left == []
        assert path.name in refused or any(name in refused for name in download.public_files())
    else:
        assert left in ([], ["installed"])


def test_a_good_bundle_goes_through_both_doors(tmp_path: Path, known: None) -> None:
    (tmp_path / "x.zip").write_bytes(zipped(TEXTS))
    assert [len(examples) for _, examples in suite_of(tmp_path / "x.zip")] == [30, 30, 30]
    assert installed(tmp_path / "x.zip") == []


@pytest.mark.parametrize("door", [suite_of, installed])
def test_a_hostile_bundle_is_refused_by_name_and_leaves_nothing(
    tmp_path: Path, known: None, door: Door, figure: Callable[..., Figure]
) -> None:
    tried = figure("P12", f"hostile bundles, {'read' if door is suite_of else 'installed'}")
    path = tmp_path / "x.zip"
    for kind, data in HOSTILE.items():
        path.write_bytes(data)
        with tried.trial(kind), pytest.raises(UserError):
            door(path)
        assert [each.name for each in tmp_path.iterdir()] == ["x.zip"], kind


# Reads a good bundle, then others; says of each how it ended, and how much more memory it took.
MEASURED = """
import json, sys
from pathlib import Path
from nanochat.evaluation.core import bundle as core_bundle
from nanochat.common.errors import UserError

def read(name):
    bundle = core_bundle.open_bundle(Path(name))
    return [core_bundle.load_examples(bundle, task) for task in core_bundle.load_tasks(bundle)]

def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) / 1024
read(sys.argv[1])
for name in sys.argv[2:]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now
    before, ended = peak(), ""
    try:
        read(name)
    except UserError as error:
        ended = str(error)
    print(json.dumps([ended, peak() - before]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_bomb_is_refused_in_ten_megabytes(tmp_path: Path, figure: Callable[..., Figure]) -> None:
    tried = figure("P12", "bombs")
    paths = {kind: tmp_path / f"{number}.zip" for number, kind in enumerate(BOMBS)}
    for kind, path in paths.items():
        path.write_bytes(BOMBS[kind]())
    (tmp_path / "good.zip").write_bytes(zipped(TEXTS))
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "good.zip"), *map(str, paths.values())]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for kind, line in zip(paths, done.stdout.splitlines(), strict=True):
        ended, mib = json.loads(line)
        with tried.trial(kind):
            assert ended
            assert mib <= 10
        tried.measure(mib, "MiB more than before")


def mutants(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Copies with one to three bytes changed, half of them in the headers and the directory."""
    rng = random.Random(seed)
    heads = [
        at
        for name in TEXTS
        for start, size in entries(data, "b/" + name)
        for at in range(start, start + size)
    ]
    for _ in range(count):
        damaged = bytearray(data)
        for _ in range(rng.randrange(1, 4)):
            at = rng.choice(heads) if rng.random() < 0.5 else rng.randrange(len(data))
            damaged[at] = rng.randrange(256)
        yield bytes(damaged)


@pytest.mark.parametrize("count", [300, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("door", [suite_of, installed])
def test_mutated_bundles_are_right_or_refused_by_name(
    tmp_path: Path, known: None, door: Door, count: int, figure: Callable[..., Figure]
) -> None:
    tried = figure("P12", f"mutations of a bundle, {'read' if door is suite_of else 'installed'}")
    path = tmp_path / "x.zip"
    path.write_bytes(zipped(TEXTS))
    right = door(path)
    shutil.rmtree(tmp_path / "installed", ignore_errors=True)
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED):
        for number, data in enumerate(mutants(zipped(TEXTS, method), count // 2, method)):
            path.write_bytes(data)
            with tried.trial(f"{number} of method {method}"):
                check(door, path, right)


@pytest.mark.parametrize("count", [pytest.param(4), pytest.param(60, marks=pytest.mark.slow)])
def test_mutations_of_the_real_bundle(
    tmp_path: Path, shared_data: Path, count: int, figure: Callable[..., Figure]
) -> None:
    """As the small one; what is compared are the digests of all files, of which the tasks are made."""
    tried = figure("P12", "mutations of the real bundle")
    data, path, rng = (shared_data / "eval_bundle.zip").read_bytes(), tmp_path / "x.zip", random.Random(0)
    directory = data.index(b"PK\x01\x02")
    for number in range(count):
        damaged = bytearray(data)
        damaged[rng.randrange(*((directory, len(data)) if number % 2 else (0, len(data))))] ^= (
            1 << rng.randrange(8)
        )
        path.write_bytes(damaged)
        with tried.trial(number):
            check(installed, path, [])
