"""Checkpoints: whole or not there, damage named before use, another run refused with the difference."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanochat.checkpoint import format as checkpoint_format
from nanochat.checkpoint import state as checkpoint_state
from nanochat.common import files
from nanochat.common.errors import UserError
from nanochat.common.machine import Precision
from nanochat.model.gpt import GPT
from nanochat.tokenizer.tokenizer import Tokenizer
from tests.conftest import REPO
from tests.tiny import train_tiny, trained_base

FP32 = Precision(torch.float32, "sdpa")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base directory with a finished run that has checkpoints of steps 8 and 12."""
    return trained_base(tmp_path_factory.mktemp("trained"))


@pytest.fixture(autouse=True)
def run(trained: Path, base_dir: Path) -> None:
    """The run, in this test's own base directory."""
    shutil.copytree(trained, base_dir)


def test_a_checkpoint_has_its_four_files_and_retention_keeps_two() -> None:
    assert checkpoint_format.steps_of("tiny") == [8, 12]
    folder = checkpoint_format.folder_of("tiny", 12)
    assert folder.name == "step_000012"
    assert sorted(path.name for path in folder.iterdir()) == [
        "MANIFEST.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    assert sorted(path.name for path in folder.parent.iterdir()) == ["step_000008", "step_000012"]


def test_tensors_are_whole_and_fp32_under_their_parameter_names() -> None:
    model, _, meta = checkpoint_state.load_model("tiny", device=torch.device("cpu"), precision=FP32)
    tensors = load_file(checkpoint_format.folder_of("tiny", 12) / "model.safetensors")
    assert {name: p.shape for name, p in model.named_parameters()} == {n: t.shape for n, t in tensors.items()}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert meta["step"] == 12


def test_a_model_that_computes_in_bf16_is_held_in_bf16_and_says_the_same() -> None:
    half = Precision(torch.bfloat16, "sdpa")
    model, _, _ = checkpoint_state.load_model("tiny", device=torch.device("cpu"), precision=half)
    masters, _, _ = checkpoint_state.load_model("tiny", device=torch.device("cpu"), precision=FP32)
    cast = GPT(model.config, half)
    cast.load_state_dict(masters.state_dict())  # fp32, cast by every pass
    ids = torch.arange(8)[None]
    assert torch.equal(model.logits(ids), cast.logits(ids))
    assert {p.dtype for p in model.parameters() if p.dim() > 1} == {torch.bfloat16}
    assert {p.dtype for p in masters.parameters()} == {torch.float32}


def test_a_loaded_model_has_no_uninitialised_buffer() -> None:
    model, _, _ = checkpoint_state.load_model("tiny", device=torch.device("cpu"), precision=FP32)
    ids = torch.arange(8)[None]
    again, _, _ = checkpoint_state.load_model("tiny", device=torch.device("cpu"), precision=FP32)
    assert torch.isfinite(model.logits(ids)).all()
    assert torch.equal(model.logits(ids), again.logits(ids))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json"]
)
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "remove"])
def test_damage_is_named_and_the_last_good_one_is_used(
    name: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint_format.folder_of("tiny", 12) / name
    data = bytearray(path.read_bytes())
    if damage == "flip":
        rng = random.Random(name)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(7)
    path.write_bytes({"flip": data, "truncate": data[: len(data) // 2], "empty": b""}.get(damage, data))
    if damage == "remove":
        path.unlink()
    assert checkpoint_format.find("tiny", None) == checkpoint_format.folder_of("tiny", 8)
    named = "step_000012" if name == "MANIFEST.json" else name  # a wrong entry accuses the file it describes
    assert named in capsys.readouterr().out
    with pytest.raises(UserError, match=named):
        checkpoint_format.find("tiny", 12)


def test_all_damaged_is_an_error_not_a_new_start() -> None:
    for step in (8, 12):
        (checkpoint_format.folder_of("tiny", step) / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="none of its 2 checkpoints is whole"):
        checkpoint_format.find("tiny", None)


@pytest.mark.parametrize("lost", ["manifest", "folder of files"])
def test_checkpoints_that_cannot_be_told_are_no_new_start(lost: str, base_dir: Path) -> None:
    """What is there but not whole is said; the remedy of the message begins anew and loses nothing."""
    metrics = files.run_dir("tiny") / "metrics.jsonl"
    before = metrics.read_bytes()
    for step in (8, 12):
        for path in list(checkpoint_format.folder_of("tiny", step).iterdir()):
            if lost != "manifest" or path.name == checkpoint_format.MANIFEST:
                path.unlink()
    with pytest.raises(
        UserError, match=r"none of its 2 checkpoints is whole; of the newest: .*step_000012.*"
    ):
        train_tiny(resume="auto")
    assert metrics.read_bytes() == before
    folder = files.checkpoints_dir("tiny")
    folder.rename(folder.with_name("checkpoints.old"))
    assert train_tiny(resume="auto")["steps"] == 12
    assert metrics.with_name("metrics.1.jsonl").read_bytes() == before


def test_a_folder_that_cannot_be_listed_is_no_new_start(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.scandir

    def refuse(path: str) -> Any:
        if Path(path).name == "checkpoints":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"checkpoints: cannot be listed \(Permission denied\)"):
        train_tiny(resume="auto")


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json"]
)
@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_an_error_of_reading_is_damage_of_that_file(
    name: str, number: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, real = checkpoint_format.folder_of("tiny", 12) / name, io.open

    def opened(file: Any, *args: Any, **how: Any) -> Any:
        if file == bad:
            raise OSError(number, os.strerror(number))  # as read raises it: without a name
        return real(file, *args, **how)

    monkeypatch.setattr(io, "open", opened)
    assert checkpoint_format.find("tiny", None) == checkpoint_format.folder_of("tiny", 8)
    assert f"{bad}: cannot be read ({os.strerror(number)})" in capsys.readouterr().out
    with pytest.raises(UserError, match=name):
        checkpoint_state.load_model("tiny", 12, device=torch.device("cpu"), precision=FP32)


@pytest.mark.parametrize("name", ["state.json", "MANIFEST.json"])
def test_a_number_of_5000_digits_is_damage(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkpoint_format.folder_of("tiny", 12) / name
    path.write_text(path.read_text().replace('"format": 1', '"format": ' + "9" * 5000))
    if name == "state.json":
        sign(path.parent)
        with pytest.raises(UserError, match="state.json"):
            checkpoint_state.load_model("tiny", device=torch.device("cpu"), precision=FP32)
    else:
        assert checkpoint_format.find("tiny", None) == checkpoint_format.folder_of("tiny", 8)
        assert name in capsys.readouterr().out


def sign(folder: Path) -> None:
    """Make the manifest fit what is there."""
    listed = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": files.sha256(folder / name)}
        for name in (checkpoint_format.MODEL, checkpoint_format.OPTIMIZER, checkpoint_format.STATE)
    }
    (folder / checkpoint_format.MANIFEST).write_text(json.dumps({"format": 1, "files": listed}))


MOMENT = "blocks.0.mlp.up.weight.momentum"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.update({MOMENT: t[MOMENT].double()}), "torch.float64"),
        (lambda t: t.update({MOMENT: t[MOMENT].half()}), "torch.float16"),
        (lambda t: t.update({MOMENT: t[MOMENT].long()}), "torch.int64"),
        (lambda t: t.update({MOMENT: t[MOMENT] > 0}), "torch.bool"),
        (lambda t: t.update({MOMENT: t[MOMENT].T.contiguous()}), "of shape"),
        (lambda t: t.pop(MOMENT), "is missing"),
        (lambda t: t.update({"extra": torch.zeros(2)}), "extra belongs to no parameter"),
        (lambda t: t[MOMENT].fill_(float("nan")), "is not finite"),
    ],
    ids=["fp64", "fp16", "int64", "bool", "shape", "missing", "extra", "nan"],
)
def test_moments_of_another_kind_are_refused_by_the_name_of_their_file(change: Any, named: str) -> None:
    path = checkpoint_format.folder_of("tiny", 12) / checkpoint_format.OPTIMIZER
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    sign(path.parent)
    with pytest.raises(UserError, match=named) as refused:
        train_tiny(resume="auto")
    assert "step_000012" in str(refused.value)


@pytest.mark.skipif(os.name == "nt", reason="modes of POSIX")
@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_the_umask_decides_who_reads_a_checkpoint(umask: int) -> None:
    before = os.umask(umask)
    try:
        train_tiny(run="shared")
    finally:
        os.umask(before)
    for path in checkpoint_format.folder_of("shared", 12).iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path.name


def test_a_reader_looks_again_where_a_trainer_has_deleted_what_it_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The newest goes while it is verified, the next while it is read; each time another has come."""
    real_verify, real_read = checkpoint_format.verify, checkpoint_format.read_tensors
    folder = checkpoint_format.folder_of

    def replace(old: int, new: int) -> None:
        meta = files.read_json(folder("tiny", old) / checkpoint_format.STATE)
        shutil.move(folder("tiny", old), folder("tiny", new))
        (folder("tiny", new) / checkpoint_format.STATE).write_text(json.dumps({**meta, "step": new}))
        sign(folder("tiny", new))

    def verify(at: Path) -> None:
        if at.name == "step_000012":
            files.remove_dir(folder("tiny", 8))
            replace(12, 16)
        real_verify(at)

    def read(path: Path) -> Any:
        if path.parent.name == "step_000016":
            replace(16, 20)
        return real_read(path)

    monkeypatch.setattr(checkpoint_format, "verify", verify)
    monkeypatch.setattr(checkpoint_format, "read_tensors", read)
    _, _, meta = checkpoint_state.load_model("tiny", device=torch.device("cpu"), precision=FP32)
    assert meta["step"] == 20
    assert capsys.readouterr().out == ""


def test_absent_step_lists_those_that_are_there() -> None:
    with pytest.raises(UserError, match=r"no checkpoint of step 5. There are: 8, 12"):
        checkpoint_format.find("tiny", 5)
    with pytest.raises(UserError, match="unknown run 'other'.*tiny"):
        checkpoint_state.load_model("other", device=torch.device("cpu"), precision=FP32)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"depth": 3}, "model.n_layer"),
        ({"seed": 1}, "--seed"),
        ({"num_iterations": 13}, "steps"),
        ({"total_batch_size": 512}, "batch_tokens"),
        ({"matrix_lr": 0.5}, "groups.matrix.lr"),
        ({"warmup_steps": 3}, "schedule.warmup_steps"),
        ({"keep_tails": True}, "--keep-tails"),
    ],
)
def test_another_plan_is_refused_with_the_difference(changes: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=f"cannot be resumed.*{named}: .* then, .* now"):
        train_tiny(resume="auto", **changes)


def test_another_tokenizer_is_refused() -> None:
    Tokenizer.train(["other text, of the same size"], 300).save(files.tokenizer_dir("local"))
    with pytest.raises(UserError, match="tokenizer hash: .* then, .* now"):
        train_tiny(resume="auto")
    with pytest.raises(UserError, match="is not the one that run 'tiny' was trained with"):
        checkpoint_state.load_model("tiny", device=torch.device("cpu"), precision=FP32)


@pytest.mark.parametrize("share", [0.0, 0.9])
def test_a_full_disk_costs_nothing_but_the_save(share: float) -> None:
    folder = files.checkpoints_dir("tiny")
    limit = int(share * (folder / "step_000012" / "optimizer.safetensors").stat().st_size)
    shutil.rmtree(folder / "step_000012")
    script = f"""
        import resource, signal
        from nanochat.train import run as train
        from nanochat.common.errors import cli
        from tests.tiny import train_tiny

        real_step = train.train_step

        def limited(*args):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
            return real_step(*args)

        train.train_step = limited
        cli(lambda: train_tiny(resume="auto"))()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=REPO, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr
    *warnings, last = done.stderr.splitlines()  # where not a byte can be written, metrics say so as well
    assert last.startswith("error: ")
    assert [
        line for line in warnings if not line.startswith("warning: ") or "metrics.jsonl" not in line
    ] == []
    assert len(warnings) <= 2  # at its first line, and at the end
    assert [path.name for path in folder.iterdir()] == ["step_000008"]
    checkpoint_format.verify(folder / "step_000008")
