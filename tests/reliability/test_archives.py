"""P12, the archives' part: unpacking neither escapes nor explodes, and what is refused leaves nothing."""

from __future__ import annotations

import io
import json
import random
import stat
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from nanochat import files
from nanochat.errors import UserError
from tests.reliability import record

LIMIT = 1 << 20


def zipped(members: list[tuple[str | zipfile.ZipInfo, bytes]], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return buffer.getvalue()


def link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


def encrypted(data: bytes) -> bytes:
    """The flag of encryption set, in the local header and in the directory."""
    damaged = bytearray(data)
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        damaged[data.index(mark) + at] |= 1
    return bytes(damaged)


def claims(data: bytes, size: int) -> bytes:
    """Both headers claim that the member has so many bytes."""
    damaged = bytearray(data)
    for mark, at in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        struct.pack_into("<I", damaged, data.index(mark) + at, size)
    return bytes(damaged)


GOOD = zipped([("a/b.txt", b"words " * 1000), ("c.txt", b"more")])
HOSTILE = {
    "up": zipped([("../evil", b"x")]),
    "up from below": zipped([("a/../../evil", b"x")]),
    "absolute": zipped([("/evil", b"x")]),
    "drive": zipped([("C:/evil", b"x")]),
    "backslashes": zipped([("..\\evil", b"x")]),
    "up with backslashes in the middle": zipped([("a\\..\\..\\evil", b"x")]),
    "symlink": zipped([(link("link"), b"/etc/passwd")]),
    "symlink, then below it": zipped([(link("link"), b".."), ("link/evil", b"x")]),
    "bomb": zipped([("zeros", bytes(64 << 20))]),
    "bomb of many": zipped([(f"zeros{i}", bytes(1 << 16)) for i in range(100)]),
    "bomb that claims to be small": claims(zipped([("zeros", bytes(64 << 20))]), 100),
    "one name twice": zipped([("a", b"1"), ("b", b"2")]).replace(b"b", b"a"),
    "a folder that is a file": zipped([("a", b"1"), ("a/b", b"2")]),
    "encrypted": encrypted(zipped([("a", b"secret")])),
    "not a zip": b"PK\x03\x04 and so on",
    "empty": b"",
    "an unknown method": zipped([("a", b"1")], zipfile.ZIP_STORED).replace(
        b"\x14\x00\x00\x00\x00\x00", b"\x14\x00\x00\x00\x63\x00"
    ),
    "a very long name": zipped([("x" * 5000, b"1")]),
    "100,000 members": zipped([(f"{i}", b"") for i in range(100_000)], zipfile.ZIP_STORED),
}

# Unpacks an archive; says how it ended, and how much memory it took.
UNPACK = """
import json, sys
from pathlib import Path
from nanochat import files
from nanochat.errors import UserError

def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) >> 10
before = peak()
try:
    files.safe_unzip(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
    ended = ""
except UserError as error:
    ended = str(error)
print(json.dumps([ended, peak() - before]))
"""


@pytest.mark.parametrize("kind", list(HOSTILE))
def test_a_hostile_archive_is_refused_and_leaves_nothing(tmp_path: Path, kind: str) -> None:
    archive = tmp_path / "x.zip"
    archive.write_bytes(HOSTILE[kind])
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match=r"x\.zip"):
        files.safe_unzip(archive, tmp_path / "in" / "out", LIMIT)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["in", "x.zip"]


def test_the_hostile_archives_that_are_refused_are_counted(tmp_path: Path) -> None:
    refused = 0
    for kind in HOSTILE:
        (tmp_path / "x.zip").write_bytes(HOSTILE[kind])
        try:
            files.safe_unzip(tmp_path / "x.zip", tmp_path / "out", LIMIT)
        except UserError:
            refused += 1
    record("P12", n=len(HOSTILE), failures=len(HOSTILE) - refused, worst=0, unit="hostile zips")
    assert refused == len(HOSTILE)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["bomb", "bomb that claims to be small"])
def test_a_bomb_takes_little_memory(tmp_path: Path, kind: str) -> None:
    archive = tmp_path / "x.zip"
    archive.write_bytes(HOSTILE[kind])
    command = [sys.executable, "-c", UNPACK, str(archive), str(tmp_path / "out"), str(LIMIT)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    ended, mib = json.loads(done.stdout)
    assert ended
    assert mib < 50
    record("P12", n=1, failures=0, worst=mib, unit=f"memory of zip: {kind}", note="worst: MiB")


def test_an_archive_inside_an_archive_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(zipped([("inner.zip", HOSTILE["bomb"])]))
    files.safe_unzip(tmp_path / "x.zip", tmp_path / "out", LIMIT)
    assert (tmp_path / "out" / "inner.zip").read_bytes() == HOSTILE["bomb"]


def test_a_thousand_mutations_give_the_members_or_an_error(tmp_path: Path) -> None:
    archive, out = tmp_path / "x.zip", tmp_path / "out"
    rng = random.Random(0)
    refused = 0
    for _ in range(1000):
        data = bytearray(GOOD)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        archive.write_bytes(data)
        try:
            files.safe_unzip(archive, out, LIMIT)
        except UserError:
            refused += 1
            assert [path.name for path in tmp_path.iterdir()] in (
                ["x.zip"],
                ["x.zip", "out"],
                ["out", "x.zip"],
            )
    record("P12", n=1000, failures=0, worst=0, unit="mutations of a zip", note=f"{refused} refused")
    assert refused > 200
