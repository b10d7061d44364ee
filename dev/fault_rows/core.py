"""Rows of the CORE tasks: bundles, their download, scores and their comparison."""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile

from dev.fault_box import TINY, Box, expect_error, expect_ok, row

TEXTS = {
    "core.yaml": "icl_tasks: [{label: pets, dataset_uri: pets, num_fewshot: 1, icl_task_type: schema}]",
    "eval_meta_data.csv": "Eval Task,Random baseline\npets,50\n",
    "eval_data/pets": '{"context_options": ["the cat", "a mat"], "continuation": "sat", "gold": 0}\n' * 6,
}

# Reads a bundle as base_eval does before it scores, and says how that ended and what memory it took.
READ = """
import json, sys
from pathlib import Path
from nanochat import core_tasks
from nanochat.errors import UserError

def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) / 1024
before, ended = peak(), ""
try:
    bundle = core_tasks.open_bundle(Path(sys.argv[1]))
    for task in core_tasks.load_tasks(bundle):
        core_tasks.load_examples(bundle, task)
except UserError as error:
    ended = str(error)
print(json.dumps([ended, peak() - before]))
"""

# The same of many zips, whose bytes differ in what stdin says; prints those that end in something else.
READ_MANY = """
import json, sys
from pathlib import Path
from nanochat import core_tasks
from nanochat.errors import UserError

def read(path):
    bundle = core_tasks.open_bundle(path)
    return [core_tasks.load_examples(bundle, task) for task in core_tasks.load_tasks(bundle)]

path, data = Path("x.zip"), Path("good.zip").read_bytes()
right = read(Path("good.zip"))
for changes in json.load(sys.stdin):
    damaged = bytearray(data)
    for at, byte in changes:
        damaged[at] = byte
    path.write_bytes(damaged)
    try:
        if read(path) != right:
            print("read as other tasks", changes)
    except UserError:
        pass
    except BaseException as error:
        print(repr(error), changes)
"""


def zipped(texts: dict[str, str | bytes]) -> bytes:
    """A bundle as a zip file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in texts.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def claiming(data: bytes, name: bytes, size: int) -> bytes:
    """A zip whose two headers claim that a member has `size` bytes."""
    patched = bytearray(data)
    struct.pack_into("<I", patched, data.index(name) - 30 + 22, size)
    struct.pack_into("<I", patched, data.rindex(name) - 46 + 24, size)
    return bytes(patched)


@row(
    "Z1", "an eval bundle of 0.6 MB that unpacks to 600 MB, its header true or a lie", wanted="10 MB at most"
)
def z1(box: Box) -> None:
    """The door of base_eval, then the command itself."""
    box.tiny()
    expect_ok(box.run("base_train", *tiny_run("one")))
    bomb, path = zipped(TEXTS | {"eval_data/pets": bytes(600 << 20)}), box.folder / "x.zip"
    for claimed in (600 << 20, 100, 1_900_000, 60_000_000):
        path.write_bytes(claiming(bomb, b"eval_data/pets", claimed))
        done = box.python(READ, path)
        expect_ok(done)
        ended, mib = json.loads(done.stdout)
        assert "x.zip" in ended, f"claims {claimed}: {ended or 'read'}"
        assert mib <= 10, f"claims {claimed}: {mib:.0f} MiB"
    flags = ("--run=one", "--eval=core", "--device-type=cpu", "--dtype=float32")
    expect_error(box.run("base_eval", *flags, f"--eval-bundle={path}"), "x.zip")


@row("Z2", "2,000 eval bundles with one to three bytes changed", wanted="read right, or refused by name")
def z2(box: Box) -> None:
    """Half of the changes are in headers and directory."""
    data = zipped(TEXTS)
    (box.folder / "good.zip").write_bytes(data)
    rng = random.Random(1)
    directory = data.index(b"PK\x01\x02")
    changes = [
        [
            (rng.randrange(*rng.choice([(0, len(data)), (directory, len(data))])), rng.randrange(256))
            for _ in range(rng.randrange(1, 4))
        ]
        for _ in range(2000)
    ]
    done = box.python(READ_MANY, input=json.dumps(changes), cwd=box.folder)
    expect_ok(done)
    assert not done.stdout, f"{len(done.stdout.splitlines())} of 2000: {done.stdout.splitlines()[0]}"


def tiny_run(name: str, steps: int = 2) -> list[str]:
    """Flags of a run of a few steps."""
    return [*TINY, f"--run={name}", f"--num-iterations={steps}", "--eval-every=0"]
