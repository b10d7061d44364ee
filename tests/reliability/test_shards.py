"""P5 and P12, the shards' part: damage is found and named; hostile files neither crash nor explode."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.common import files
from nanochat.common.checksums import ChecksummedFile
from nanochat.common.errors import UserError
from nanochat.data import parquet_shards, sources
from nanochat.data.corpus import Corpus
from tests.reliability.figures import Figure
from tests.shard_files import read_texts, write_like_the_hub

DOCUMENTS = [f"document {i} " + "".join(chr(97 + i * j % 26) for j in range(i % 300)) for i in range(250)]


def make() -> Corpus:
    """A corpus of one training shard with two row groups, and a validation shard."""
    folder = files.data_dir("c")
    folder.mkdir(parents=True)
    members = parquet_shards.write_shards(DOCUMENTS, folder, "train", 0)
    members += parquet_shards.write_shards(DOCUMENTS[:20], folder, "val", 1)
    Corpus(folder, "c", "local files", members).write_manifest(folder)
    return Corpus.open("c")


def flipped(data: bytes, bit: int) -> bytes:
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def cases_of_damage(corpus: Corpus, flips: int) -> list[bytes]:
    """What stands in a shard's place: bits flipped, ends cut, other files, valid parquet of other text."""
    good = corpus.path(corpus.train_shards[0]).read_bytes()
    rng = random.Random(0)
    cases = [flipped(good, rng.randrange(8 * len(good))) for _ in range(flips)]
    cases += [good[: rng.randrange(1, len(good))] for _ in range(20)]
    cases += [b"", good + b"\0", corpus.path(corpus.val_shards[0]).read_bytes()]
    other = corpus.folder.parent / "other.parquet"
    changed = [DOCUMENTS[0].replace("document", "dokument"), *DOCUMENTS[1:]]
    pq.write_table(pa.table({"text": changed}), other)
    cases.append(other.read_bytes())
    [same_counts] = parquet_shards.write_shards(changed, corpus.folder.parent, "train", 77)
    cases.append((corpus.folder.parent / same_counts.name).read_bytes())
    return cases


def count_damage(corpus: Corpus, cases: list[bytes]) -> tuple[int, int, int]:
    """How many cases were detected, were named as promised, and gave other text in silence."""
    shard = corpus.train_shards[0]
    path = corpus.path(shard)
    good = path.read_bytes()
    detected = named = silent = 0
    for damaged in cases:
        path.write_bytes(damaged)
        try:
            silent += Corpus.open("c").read_block(shard, 0) != DOCUMENTS
        except UserError as error:
            detected += 1
            promised = (str(path), shard.sha256, files.sha256(path), "Repair: ")
            named += all(part in str(error) for part in promised)
    path.write_bytes(good)
    return detected, named, silent


def test_every_damage_is_detected_and_named(figure: Callable[..., Figure]) -> None:
    corpus = make()
    damage = figure("P5", "damaged shards when they are opened")
    for index, case in enumerate(cases_of_damage(corpus, flips=500)):
        with damage.trial(index):
            assert count_damage(corpus, [case]) == (1, 1, 0)
    assert damage.checks == 525
    assert Corpus.open("c").read_block(corpus.train_shards[0], 0) == DOCUMENTS


def test_shards_that_change_places_are_named() -> None:
    corpus = make()
    train, val = (corpus.path(s) for s in corpus.shards)
    data = train.read_bytes()
    train.write_bytes(val.read_bytes())
    val.write_bytes(data)
    with pytest.raises(UserError, match=r"shard_0000\d\.parquet: the shard is damaged"):
        Corpus.open("c")


def test_planted_without_any_check_damage_passes_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness sees what it must see: as peers read, a quarter of the flips give other text."""
    corpus = make()
    cases = cases_of_damage(corpus, flips=200)[:200]
    monkeypatch.setattr(parquet_shards, "open_shard", lambda path, shard: ChecksummedFile(path))
    original = pq.ParquetFile
    monkeypatch.setattr(pq, "ParquetFile", lambda path, **options: original(path))
    _, named, silent = count_damage(corpus, cases)
    assert named == 0
    assert silent > 40


# -----------------------------------------------------------------------------
# P12: hostile parquet


def varint(value: int, length: int) -> bytes:
    """A zigzag varint of thrift, drawn out to so many bytes."""
    value <<= 1
    digits = [value >> 7 * i & 127 for i in range(length)]
    return bytes([*(digit | 128 for digit in digits[:-1]), digits[-1]])


def lies(data: bytes, true: int, told: int, length: int) -> list[bytes]:
    """A parquet file in whose footer a number is replaced by another: at each of its places, and at all."""
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    parts = data[start:].split(varint(true, length))
    assert len(parts) > 1
    told_parts = [varint(true, length).join(parts[: i + 1]) for i in range(len(parts) - 1)]
    rest = [varint(true, length).join(parts[i + 1 :]) for i in range(len(parts) - 1)]
    at_one = [head + varint(told, length) + tail for head, tail in zip(told_parts, rest, strict=True)]
    return [data[:start] + footer for footer in [*at_one, varint(told, length).join(parts)]]


# Reads a file as shard and as a file of the user, within memory; says how it ended and how much it took.
READ = """
import json, sys
from itertools import islice
from pathlib import Path
from nanochat.data import sources
from nanochat.common.errors import UserError
from tests.shard_files import read_texts

path = Path(sys.argv[1])
read_texts(Path(sys.argv[2]), 0)
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) >> 10
ended, before = [], peak()
as_file = lambda: sum(map(len, islice(sources.local_documents([path]), 200)))
for read in (lambda: read_texts(path, 0), as_file):
    try:
        read()
        ended.append("read")
    except UserError as error:
        ended.append(str(error))
    ended.append(peak() - before)
print(json.dumps(ended))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["one document", "one word for many rows", "sizes that lie", "plain rows"])
def test_a_bomb_takes_little_memory(tmp_path: Path, kind: str, figure: Callable[..., Figure]) -> None:
    bomb = figure("P12", f"bomb as a shard: {kind}")
    path, good = tmp_path / "bomb.parquet", tmp_path / "shard_00000.parquet"
    parquet_shards.write_shards(DOCUMENTS, tmp_path, "train", 0)
    big = "\0" * (32 << 20)
    options = {"compression": "zstd", "use_dictionary": kind in ("one word for many rows", "sizes that lie")}
    rows = {"one document": 1, "plain rows": 12}.get(kind, 1000)
    texts = pa.array([big]).take(pa.array([0] * min(rows, 12)))
    if options["use_dictionary"]:
        texts = pa.DictionaryArray.from_arrays(pa.array([0] * rows), pa.array([big]))
        pq.write_table(pa.table({"text": texts}), path, compression="zstd", store_schema=False)
    else:
        pq.write_table(pa.table({"text": texts}), path, write_statistics=False, **options)
    if kind == "sizes that lie":
        honest = pq.ParquetFile(path).metadata.row_group(0).total_byte_size
        path.write_bytes(lies(path.read_bytes(), honest, 4096, 4)[-1])
        assert pq.ParquetFile(path).metadata.row_group(0).total_byte_size == 4096
    assert path.stat().st_size < 100_000
    done = subprocess.run([sys.executable, "-c", READ, str(path), str(good)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    as_shard, shard_mib, as_file, file_mib = json.loads(done.stdout)
    if kind == "one document":
        assert as_shard == as_file == "read"
    else:
        assert "at most" in as_shard or "holds more than" in as_shard
    bomb.measure(shard_mib, "MiB")
    # Of a shard: 128 MiB of text, the batch that goes beyond and its buffers. Of a user's file: its pages.
    with bomb.trial():
        assert shard_mib < 300
        assert file_mib < 1000


def test_counts_that_lie_give_an_error_or_the_first_documents(
    tmp_path: Path, figure: Callable[..., Figure]
) -> None:
    lying = figure("P12", "counts that lie")
    [shard] = parquet_shards.write_shards(DOCUMENTS, tmp_path, "train", 0)
    good = (tmp_path / shard.name).read_bytes()
    path = tmp_path / "x.parquet"
    refused = 0
    for told in (0, 1, 100, 249, 251, 5000, 8191):
        for data in lies(good, 250, told, 2):
            path.write_bytes(data)
            with lying.trial(told):
                assert parquet_shards.problem(path, shard)
                try:
                    texts = read_texts(path, 0)
                    assert texts == DOCUMENTS[: len(texts)]
                except UserError:
                    refused += 1
    assert refused >= 5


class Upper(pa.ExtensionType):
    """A type of its own whose reading would run its code (CVE-2023-47248 was of this kind)."""

    ran = False

    def __init__(self) -> None:
        super().__init__(pa.string(), "test.upper")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage: pa.DataType, serialized: bytes) -> Upper:
        cls.ran = True
        return cls()


def test_other_types_and_extension_types_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    wrong = [
        pa.array([1, 2]),
        pa.array([b"a", b"b"]),
        pa.array([["a"], ["b"]]),
        pa.array([{"text": "a"}, {"text": "b"}]),
        pa.array([None, None]),
        pa.array([1.5, 2.5]),
    ]
    for column in wrong:
        pq.write_table(pa.table({"text": column}), path)
        with pytest.raises(UserError, match=r"x\.parquet: column 'text' holds"):
            read_texts(path, 0)
        if pa.types.is_binary(column.type):  # what a person brings may be bytes that are UTF-8
            assert list(sources.local_documents([path])) == ["a", "b"]
        else:
            with pytest.raises(UserError, match=r"x\.parquet: column 'text' holds"):
                list(sources.local_documents([path]))
    extended = pa.ExtensionArray.from_storage(Upper(), pa.array(["a", "b"]))
    pa.register_extension_type(Upper())
    try:
        pq.write_table(pa.table({"text": extended}), path)
        with pytest.raises(UserError, match=r"x\.parquet: column 'text' holds"):
            read_texts(path, 0)
    finally:
        pa.unregister_extension_type("test.upper")
    Upper.ran = False
    assert read_texts(path, 0) == ["a", "b"]  # nobody knows the type any more: it is text
    assert not Upper.ran


MUTATE = """
import random, resource, sys
from pathlib import Path
from nanochat.data import parquet_shards as shards
from nanochat.common.errors import UserError
from tests.shard_files import read_texts

original, count, may_differ = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "may differ"
good, right, shard = original.read_bytes(), read_texts(original, 0), shards.describe(original, "train")
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
footer = len(good) - 8 - int.from_bytes(good[-8:-4], "little")
rng = random.Random(0)
path = original.with_name("x.parquet")
refused = 0
for i in range(count):
    data = bytearray(good)
    for _ in range(rng.randrange(1, 6)):  # most of them where they hurt: in the headers
        at = rng.choice((rng.randrange(len(good)), rng.randrange(footer, len(good)), rng.randrange(60)))
        data[at] = rng.randrange(256)
    path.write_bytes(data)
    assert data == good or "the shard is damaged" in shards.problem(path, shard), i
    try:
        assert read_texts(path, 0) == right or may_differ, i
    except UserError as error:
        assert str(path) in str(error)
        refused += 1
print(refused)
"""


@pytest.mark.parametrize(("kind", "count"), [("ours", 2000), ("zstd", 700), ("snappy", 700), ("none", 700)])
def test_mutations_never_crash_and_none_is_taken_for_the_shard(
    tmp_path: Path, kind: str, count: int, figure: Callable[..., Figure]
) -> None:
    """Read as if they had been made so; where the file has page checksums, no other text comes out either."""
    path = tmp_path / "shard_00000.parquet"
    if kind == "ours":
        parquet_shards.write_shards(DOCUMENTS, tmp_path, "train", 0)
    else:
        write_like_the_hub(path, DOCUMENTS, kind, rows=1024)
    mutations = figure("P12", f"processes that read {count} mutations of a shard, {kind}")
    command = [sys.executable, "-c", MUTATE, str(path), str(count), "" if kind == "ours" else "may differ"]
    done = subprocess.run(command, capture_output=True, text=True)
    with mutations.trial():
        assert done.returncode == 0, done.stderr[-2000:]
        assert int(done.stdout) > count // 2
    mutations.measure(int(done.stdout or 0), "refused as they are")


def test_a_shard_cut_at_every_byte_is_refused(tmp_path: Path) -> None:
    [shard] = parquet_shards.write_shards(["one", "two", "three"], tmp_path, "train", 0)
    path = tmp_path / shard.name
    good = path.read_bytes()
    for length in range(len(good)):
        path.write_bytes(good[:length])
        assert "the shard is damaged" in parquet_shards.problem(path, shard)
        with pytest.raises(UserError, match=r"shard_00000\.parquet"):
            read_texts(path, 0)
