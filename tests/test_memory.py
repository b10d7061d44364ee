"""The memory plan covers what a step keeps, the micro-batch obeys it, a step that did not fit is mended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat.checkpoint import format as checkpoint_format
from nanochat.common import files, machine
from nanochat.common.errors import UserError
from nanochat.common.machine import Precision
from nanochat.config import plan as planning
from nanochat.config.plan import Plan
from nanochat.data.corpus import Corpus
from nanochat.data.train_loader import Batch
from nanochat.distributed.world import World
from nanochat.model.gpt import GPT
from nanochat.tokenizer.tokenizer import Tokenizer
from nanochat.train import memory
from nanochat.train import run as train_run
from nanochat.train.stage import Pretraining
from tests.conftest import REPO
from tests.dist.launch import digest
from tests.dist.world import run_ranks, train_rank
from tests.test_optim import moments_held
from tests.test_train import stop_after
from tests.tiny import tiny_args, tiny_corpus, train_tiny

MIB = 1 << 20


def plan_of(**changes: Any) -> Plan:
    return planning.plan(tiny_args(device_batch_size=None, **changes), 300)


@pytest.mark.parametrize("kind", ["softmax", "diff1", "diff2"])
@pytest.mark.parametrize("recompute", ["none", "mlp", "block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_estimate_covers_what_a_forward_pass_keeps(recompute: str, dtype: torch.dtype, kind: str) -> None:
    plan = plan_of(
        depth=4, max_seq_len=256, aspect_ratio=64, head_dim=64, recompute=recompute, attention_kind=kind
    )
    model = GPT(plan.model, Precision(dtype, "sdpa"))
    model.init_weights(0)
    model.recompute = recompute
    own = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.zeros(8, 256, dtype=torch.int64))
    copies = 0 if dtype == torch.float32 else plan.params.matrix * dtype.itemsize
    estimated = memory.estimate(plan, 8, dtype, "cpu")
    ratio = (sum(kept.values()) - copies) / estimated.activations
    assert ratio < 1
    assert recompute == "block" or ratio > 0.4  # the rest is for one layer's way back


def test_the_parameters_are_those_of_the_model() -> None:
    plan = plan_of()
    found = memory.estimate(plan, 1, torch.float32, "cpu")
    assert found.parameters == found.gradients == 4 * plan.params.total
    constant = 4 * plan.params.unembedding
    two = memory.estimate(plan, 2, torch.float32, "cpu")
    assert two.activations - constant == 2 * (found.activations - constant)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"matrix_optimizer": "adamw"},
        {"matrix_optimizer": "soap"},
        {"matrix_optimizer": "soap", "soap_sides": 1},
    ],
    ids=lambda flags: "-".join(map(str, flags.values())),
)
def test_the_moments_are_those_of_the_optimizer(flags: dict[str, Any], tmp_path: Path) -> None:
    tiny_corpus(tmp_path)
    tokenizer = Tokenizer.load(files.tokenizer_dir("local"))
    plan = planning.plan(tiny_args(**flags), tokenizer.vocab_size)
    state = train_run.create_state(
        plan,
        Pretraining(Corpus.open("local"), tokenizer),
        Precision(torch.float32, "sdpa"),
        World.single_process(),
    )
    held = 4 * moments_held(state.optimizer)
    assert held == pytest.approx(memory.estimate(plan, 1, torch.float32, "cpu").optimizer, rel=0.03)


def test_the_micro_batch_is_made_to_fit_and_the_batch_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_corpus(tmp_path)
    train_tiny(run="roomy", device_batch_size=None, num_iterations=3)
    plan = planning.plan(
        tiny_args(device_batch_size=None), Tokenizer.load(files.tokenizer_dir("local")).vocab_size
    )
    assert plan.device_batch_size == 8
    needed = {rows: memory.estimate(plan, rows, torch.float32, "cpu") for rows in (2, 4)}
    there_already = needed[2].optimizer + 4 * plan.params.total
    free = int(needed[2].total / memory.USABLE) + 1 - there_already
    assert needed[4].total > needed[2].total
    monkeypatch.setattr(machine, "available_memory_bytes", lambda device: free)
    train_tiny(run="narrow", device_batch_size=None, num_iterations=3)
    train_tiny(run="asked", device_batch_size=8, num_iterations=3)
    derived = {
        run: files.read_json(files.run_dir(run) / "config.json") for run in ("roomy", "narrow", "asked")
    }
    found = {run: (each["device_batch_size"], each["grad_accum_steps"]) for run, each in derived.items()}
    assert found == {"roomy": (8, 1), "narrow": (2, 4), "asked": (8, 1)}
    assert derived["narrow"]["batch_tokens"] == derived["roomy"]["batch_tokens"]


def run_within(spare_mib: int) -> tuple[dict[str, Any], str]:
    # What is large is mapped and given back: what the first step has freed makes no room for the second.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.memory_script", str(spare_mib)],
        cwd=REPO,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    *told, last = done.stdout.splitlines()
    return json.loads(last), "\n".join(told)


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS and /proc")
def test_a_step_that_runs_out_of_memory_goes_on_with_smaller_micro_batches(tmp_path: Path) -> None:
    tiny_corpus(tmp_path)
    whole, told = run_within(0)
    assert whole["rows"] == 32
    assert "out of memory" not in told
    # A micro-batch of 32 rows keeps 2 layers x 20 x 128 x 4,096 tokens x 4 bytes = 85 MB.
    halved, told = run_within(45)
    assert halved["rows"] in (16, 8, 4)
    assert "out of memory with 32 rows in a micro-batch: going on with 16" in told
    assert halved["losses"] == pytest.approx(whole["losses"], abs=1e-4)
    assert halved["end"] == whole["end"]


def test_an_error_of_another_kind_is_not_taken_for_it() -> None:
    assert memory.is_out_of_memory(MemoryError())
    assert not memory.is_out_of_memory(RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert memory.is_out_of_memory(caught.value)


def test_one_row_that_does_not_fit_is_the_users_to_mend(tmp_path: Path) -> None:
    tiny_corpus(tmp_path)
    tokenizer = Tokenizer.load(files.tokenizer_dir("local"))
    plan = planning.plan(tiny_args(device_batch_size=1), tokenizer.vocab_size)
    precision, world = Precision(torch.float32, "sdpa"), World.single_process()
    state = train_run.create_state(plan, Pretraining(Corpus.open("local"), tokenizer), precision, world)

    def passes(micro_batches: list[Batch]) -> torch.Tensor:
        raise MemoryError

    with pytest.raises(UserError, match="one row"):
        memory.halve_until_it_fits(passes, state.loader.next_batch(), state, world)
    state.loader.close()


def test_a_model_larger_than_the_machine_is_refused_before_it_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_corpus(tmp_path)
    with pytest.raises(UserError, match=r"--depth=900: its .* need .* GB .* Lower --depth"):
        train_tiny(run="huge", depth=900, aspect_ratio=2048)
    assert not files.run_dir("huge").exists()
    monkeypatch.setattr(machine, "total_memory_bytes", lambda device: None)  # where the system does not tell
    train_tiny(run="told-nothing", num_iterations=1)


def rows_of(run: str, step: int) -> int:
    meta = checkpoint_format.read_state(checkpoint_format.folder_of(run, step))
    return int(meta["device_batch_size"])


def starved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Something else runs on the machine now: only one row would be chosen."""
    monkeypatch.setattr(machine, "available_memory_bytes", lambda device: 1)


BY_MEMORY: dict[str, Any] = {"device_batch_size": None, "total_batch_size": 1024}


def cut_at(step: int, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    with monkeypatch.context() as patch:
        stop_after(step, patch)
        assert train_tiny(run="cut", **{**BY_MEMORY, **changes})["status"] == "stopped"


def test_a_resume_keeps_its_rows_though_memory_is_scarcer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_corpus(tmp_path)
    train_tiny(run="whole", **BY_MEMORY)
    cut_at(6, monkeypatch)
    starved(monkeypatch)
    train_tiny(run="cut", resume="auto", **BY_MEMORY)
    assert (rows_of("cut", 12), rows_of("whole", 12)) == (32, 32)
    assert digest("cut", 12) == digest("whole", 12)
    assert "rounded in another" not in capsys.readouterr().out


def test_a_device_too_small_for_the_rows_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_corpus(tmp_path)
    cut_at(6, monkeypatch)
    monkeypatch.setattr(machine, "total_memory_bytes", lambda device: 4 * 10**6)
    train_tiny(run="cut", resume="auto", **BY_MEMORY)
    assert rows_of("cut", 12) < 32
    assert f"micro-batches of {rows_of('cut', 12)} rows, of 32 before" in capsys.readouterr().out


@pytest.mark.parametrize(("then", "now", "rows"), [(None, 4, 4), (16, None, 16), (16, 16, 16), (16, 4, 4)])
def test_other_rows_are_taken_where_they_are_asked_for(
    then: int | None,
    now: int | None,
    rows: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny_corpus(tmp_path)
    cut_at(2, monkeypatch, device_batch_size=then, num_iterations=4)
    starved(monkeypatch)
    train_tiny(run="cut", resume="auto", **{**BY_MEMORY, "device_batch_size": now, "num_iterations": 4})
    assert rows_of("cut", 4) == rows
    assert ("rounded in another" in capsys.readouterr().out) == (rows != (then or 32))


def test_rows_that_were_halved_stay_halved_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_corpus(tmp_path)
    real = GPT.loss

    def train_with_oom(run: str, **changes: Any) -> None:
        calls = [0]

        def loss(self: GPT, ids: torch.Tensor, *rest: Any, **how: Any) -> torch.Tensor:
            if torch.is_grad_enabled():
                calls[0] += 1
                if calls[0] == 3:
                    raise MemoryError
            return real(self, ids, *rest, **how)

        with monkeypatch.context() as patch:
            patch.setattr(GPT, "loss", loss)
            if run == "cut":
                cut_at(6, patch, **changes)
            else:
                train_tiny(run=run, **BY_MEMORY)

    train_with_oom("whole")
    train_with_oom("cut")
    train_tiny(run="cut", resume="auto", **BY_MEMORY)
    assert rows_of("cut", 12) == rows_of("whole", 12) == 16
    assert digest("cut", 12) == digest("whole", 12)


def starved_rank(world: World, changes: dict[str, Any]) -> None:
    """`train_rank` where memory is scarce."""
    machine.available_memory_bytes = lambda device: 1
    train_rank(world, changes, None)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_two_ranks_keep_their_rows(tmp_path: Path) -> None:
    tiny_corpus(tmp_path)
    run_ranks(2, tmp_path, train_rank, {"run": "whole", **BY_MEMORY}, None)
    run_ranks(2, tmp_path, train_rank, {"run": "cut", **BY_MEMORY}, 6)
    run_ranks(2, tmp_path, starved_rank, {"run": "cut", "resume": "auto", **BY_MEMORY})
    assert rows_of("cut", 12) == rows_of("whole", 12) == 16
    assert digest("cut", 12) == digest("whole", 12)


@pytest.mark.parametrize("rows", [0, -4, "4", 2.0, True])
def test_rows_that_no_run_has_are_refused(rows: Any, tmp_path: Path) -> None:
    tiny_corpus(tmp_path)
    train_tiny(num_iterations=1)
    folder = checkpoint_format.folder_of("tiny", 1)
    meta = checkpoint_format.read_state(folder)
    files.write_json(folder / checkpoint_format.STATE, {**meta, "device_batch_size": rows})
    with pytest.raises(UserError, match="device_batch_size"):
        checkpoint_format.read_state(folder)
