"""P11, and P5 for checkpoints: what does not come from us is refused by name; nothing in it is run."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat.checkpoint import format as checkpoint_format
from nanochat.checkpoint import state as checkpoint_state
from nanochat.checkpoint.format import MANIFEST, MODEL, OPTIMIZER, STATE
from nanochat.common import files
from nanochat.common.errors import UserError
from nanochat.common.machine import Precision
from nanochat.config import plan as planning
from nanochat.distributed.world import World
from nanochat.optim.muon_adamw import MuonAdamW
from nanochat.optim.rates import MatrixOptions
from tests.conftest import REPO
from tests.tiny import tiny_args, train_tiny, trained_base

NAMES = (MODEL, OPTIMIZER, STATE, MANIFEST)
MUTATIONS = 1000
CANARY = "canary"
CPU, FP32 = torch.device("cpu"), Precision(torch.float32, "sdpa")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base directory with a finished run that has checkpoints of steps 8 and 12."""
    return trained_base(tmp_path_factory.mktemp("trained"))


@pytest.fixture(autouse=True)
def folder(trained: Path, base_dir: Path) -> Path:
    """The newest checkpoint, in this test's own base directory."""
    shutil.copytree(trained, base_dir)
    return checkpoint_format.folder_of("tiny", 12)


def sign(folder: Path) -> None:
    """Make the manifest fit what is there, as somebody who means harm would."""
    listed = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": files.sha256(folder / name)}
        for name in (MODEL, OPTIMIZER, STATE)
    }
    (folder / MANIFEST).write_text(json.dumps({"format": 1, "files": listed}))


def load() -> dict[str, torch.Tensor]:
    """For scoring and for training; the weights."""
    model, _, _ = checkpoint_state.load_model("tiny", 12, device=CPU, precision=FP32)
    train_tiny(resume="12", num_iterations=12)
    return {name: p.detach() for name, p in model.named_parameters()}


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Damage of one of eight kinds, near the front twice out of three times: there is the structure."""
    out = bytearray(data)
    front = min(len(out), 2000) if rng.random() < 2 / 3 else len(out)
    at = rng.randrange(front)
    kind = rng.randrange(8)
    if kind <= 2:
        out[at] ^= 1 << rng.randrange(8)
    elif kind == 3:
        out[at : at + rng.randrange(1, 9)] = rng.randbytes(rng.randrange(9))
    elif kind == 4:
        del out[at:]
    elif kind == 5:
        out[:8] = struct.pack("<Q", rng.choice([0, 1, 7, len(out), 1 << 31, (1 << 63) - 1, (1 << 64) - 1]))
    elif kind == 6:
        digits = [i for i in range(front) if 48 <= out[i] <= 57]
        out[rng.choice(digits or [at])] = rng.choice(b"0123456789-.eE")
    else:
        other = rng.randrange(front)
        out[at : at + 16], out[other : other + 16] = out[other : other + 16], out[at : at + 16]
    return bytes(out)


def test_a_thousand_mutated_files_are_found_by_their_hash(folder: Path, figure: Any) -> None:
    """One branch, many inputs: the hash of the file, or the shape of the manifest."""
    rng, same = random.Random(11), 0
    found = figure("P11", "mutated files of a checkpoint: refused by name", independent=False)
    for n in range(MUTATIONS):
        path = folder / NAMES[n % 4]
        whole = path.read_bytes()
        damaged = mutated(whole, rng)
        path.write_bytes(damaged)
        with found.trial(f"{path.name}, {n}"):
            said = ""
            try:
                checkpoint_format.verify(folder)
            except UserError as error:
                said = str(error)
            if said:
                assert str(folder) in said
            else:  # a manifest of other bytes may say the same: a blank for a blank
                assert damaged == whole or json.loads(damaged) == json.loads(whole)
                same += 1
        path.write_bytes(whole)
    assert same < 0.05 * MUTATIONS


@pytest.mark.slow
def test_a_thousand_mutated_files_under_a_manifest_that_fits_never_crash(folder: Path, figure: Any) -> None:
    """Whoever can sign can put other numbers there; never another shape, dtype or step, and never a crash.

    Weights and state are loaded for scoring; the moments are taken by the optimizer of a run.
    """
    rng, refused = random.Random(12), 0
    found = figure("P11", "mutated files under a manifest made to fit: refused, or of the right shapes")
    model, _, _ = checkpoint_state.load_model("tiny", 12, device=CPU, precision=FP32)
    want = {name: p.shape for name, p in model.named_parameters()}
    plan = planning.plan(tiny_args(), model.config.vocab_size)
    optimizer = MuonAdamW(
        dict(model.named_parameters()),
        model.parameter_kinds(),
        plan.groups,
        World.single_process(),
        torch.float32,
        MatrixOptions(plan.polar_norm_factor),
    )
    for n in range(MUTATIONS):
        path = folder / NAMES[n % 3]
        whole = path.read_bytes()
        path.write_bytes(mutated(whole, rng))
        sign(folder)
        with found.trial(f"{path.name}, {n}"):
            try:
                if path.name == OPTIMIZER:
                    optimizer.load_state_tensors(checkpoint_format.read_tensors(path))
                else:
                    model, _, meta = checkpoint_state.load_model("tiny", 12, device=CPU, precision=FP32)
                    assert {name: p.shape for name, p in model.named_parameters()} == want
                    assert meta["step"] == 12
            except UserError:
                refused += 1
        path.write_bytes(whole)
    found.measure(refused, "refused of them")
    assert refused > MUTATIONS / 3


class Code:
    """What a pickle of this runs when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {CANARY}",)


def header(entries: dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def zipped_pickle(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Code()))


def no_write(path: Path) -> None:
    path.unlink()


TWIN = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
HOSTILE: dict[str, bytes | Callable[[Path], None]] = {
    "a pickle": pickle.dumps(Code()),
    "a .pt": zipped_pickle,
    "empty": b"",
    "a length of 2^63": header({}, length=1 << 63),
    "a length of 1 GB": header({}, length=1 << 30),
    "overlap": header({"a": tensor(0, 8, [2]), "b": tensor(4, 12, [2])}, bytes(12)),
    "a gap": header({"a": tensor(0, 4, [1]), "b": tensor(8, 12, [1])}, bytes(12)),
    "more claimed than there is": header({"a": tensor(0, 1 << 40, [1 << 38])}, bytes(8)),
    "a shape that overflows": header({"a": tensor(0, 8, [1 << 33, 1 << 33])}, bytes(8)),
    "a negative shape": header({"a": tensor(0, 8, [-1, -2])}, bytes(8)),
    "a shape of words": header({"a": {"dtype": "F32", "shape": "NaN", "data_offsets": [0, 4]}}, bytes(4)),
    "an unknown dtype": header({"a": tensor(0, 8, [2], "F31")}, bytes(8)),
    "one name twice": struct.pack("<Q", 2 * len(TWIN) + 3) + b"{" + TWIN + b"," + TWIN + b"}" + bytes(4),
    "a list": struct.pack("<Q", 2) + b"[]",
    "deep nesting": struct.pack("<Q", 100_000) + b"[" * 100_000,
    "a link": lambda path: (path.unlink(), path.symlink_to("/etc/passwd"))[-1],
    "a folder": lambda path: (path.unlink(), path.mkdir())[-1],
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path))[-1],
    "nothing": no_write,
}


def test_a_hostile_tensor_file_is_refused_by_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figure: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    found = figure("P11", "tensor files made by hand to do harm: refused by name")
    shutil.copytree(folder, tmp_path / "good")
    for (kind, made), name in itertools.product(HOSTILE.items(), (MODEL, OPTIMIZER)):
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "good", folder)
        if isinstance(made, bytes):
            (folder / name).write_bytes(made)
        else:
            made(folder / name)
        if (folder / name).is_file():
            sign(folder)
        with found.trial(f"{kind}, {name}"):
            with pytest.raises(UserError, match=f"{folder.name}/{name}"):
                load()
            assert not (tmp_path / CANARY).exists()


STATES: dict[str, Callable[[dict[str, Any]], object]] = {
    "another step": lambda m: m.update(step=13),
    "a step of words": lambda m: m.update(step="12"),
    "a step before the first": lambda m: m.update(step=-1),
    "no cursor": lambda m: m["loader"].update(cursors=[]),
    "a cursor of words": lambda m: m["loader"].update(cursors=["abc"]),
    "a cursor beyond": lambda m: m["loader"].update(cursors=[[0, 10**9, 0]]),
    "a cursor of 2^70": lambda m: m["loader"].update(cursors=[[1 << 70, 0, 0]]),
    "a negative cursor": lambda m: m["loader"].update(cursors=[[-1, 0, 0]]),
    "layers without end": lambda m: m["plan"]["model"].update(n_layer=10**9),
    "a width of 2^40": lambda m: m["plan"]["model"].update(n_embd=1 << 40),
    "positions of a terabyte": lambda m: m["plan"]["model"].update(sequence_len=1 << 40),
    "half a head": lambda m: m["plan"]["model"].update(head_dim=15),
    "attention of words": lambda m: m["plan"]["model"].update(attention_kind="hard"),
    "attention of a list": lambda m: m["plan"]["model"].update(attention_kind=["softmax"]),
    "no head": lambda m: m["plan"]["model"].update(n_head=0),
    "a recipe of words": lambda m: m["plan"]["model"].update(recipe="../../etc"),
    "a tokenizer elsewhere": lambda m: m["plan"]["args"].update(tokenizer="../../etc"),
    "a tokenizer that is a number": lambda m: m["plan"]["args"].update(tokenizer=7),
    "a flag of a later version": lambda m: m["plan"]["args"].update(new=1),
    "no plan": lambda m: m.pop("plan"),
    "a plan that is a list": lambda m: m.update(plan=[]),
    "no fingerprints": lambda m: m.update(fingerprints=None),
    "infinity": lambda m: m.update(smoothed_loss=float("inf")),
    "a loss scale of words": lambda m: m.update(loss_scale=["a", "b"]),
    "another format": lambda m: m.update(format=2),
}


def test_a_hostile_state_is_refused(folder: Path, figure: Any) -> None:
    found = figure("P11", "state.json made by hand to do harm: refused")
    path = folder / STATE
    good = path.read_text()
    for kind, change in STATES.items():
        meta = json.loads(good)
        change(meta)
        path.write_text(json.dumps(meta))
        sign(folder)
        with found.trial(kind), pytest.raises(UserError):
            load()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "[" * 100_000,
        '{"format": 1, "files": {"../../evil": {}}}',
        '"' + "x" * (17 << 20) + '"',
    ],
)
@pytest.mark.parametrize("name", [STATE, MANIFEST])
def test_a_hostile_json_file_is_refused_by_name(name: str, text: str, folder: Path) -> None:
    (folder / name).write_text(text)
    if name == STATE:
        sign(folder)
    with pytest.raises(UserError, match=folder.name):
        load()


# Loads a checkpoint; says how many MiB the process grew by beyond what a whole one takes.
LOAD = """
import sys, torch
from pathlib import Path
from nanochat.checkpoint import format as checkpoint_format
from nanochat.common.errors import UserError
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) >> 10
before = peak()
try:
    checkpoint_format.read_tensors(Path(sys.argv[1]))
except UserError:
    print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_kilobyte_that_claims_a_gigabyte_takes_none(tmp_path: Path, figure: Any) -> None:
    path = tmp_path / MODEL
    path.write_bytes(header({"a": tensor(0, 1 << 30, [1 << 28])}, bytes(1000)))
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(path)], cwd=REPO, capture_output=True, text=True, check=True
    )
    found = figure("P11", "memory of 1 kB that claims 1 GB")
    found.measure(int(done.stdout), "MiB")
    with found.trial():
        assert int(done.stdout) < 30
