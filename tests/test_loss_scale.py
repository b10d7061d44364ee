"""fp16: the loss scale finds its place without a wait, an overflow changes nothing, resuming is exact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat.checkpoint import format as checkpoint_format
from nanochat.common import files
from nanochat.common.errors import UserError
from nanochat.common.machine import Precision, choose_dtype
from nanochat.config import plan as planning
from nanochat.data.corpus import Corpus
from nanochat.distributed.world import World
from nanochat.optim import loss_scale
from nanochat.optim.loss_scale import LossScale
from nanochat.tokenizer.tokenizer import Tokenizer
from nanochat.train import run as train_run
from nanochat.train.stage import Pretraining
from tests.test_train import stop_after, weights
from tests.tiny import read_metrics, tiny_args, tiny_corpus

FP16, FP32 = Precision(torch.float16, "sdpa"), Precision(torch.float32, "sdpa")
CPU = torch.device("cpu")


def train_in(precision: Precision, **changes: object) -> dict[str, Any]:
    tokenizer = Tokenizer.load(files.tokenizer_dir("local"))
    plan = planning.plan(tiny_args(**changes), tokenizer.vocab_size)
    return train_run.run(
        plan, Pretraining(Corpus.open("local"), tokenizer), precision, World.single_process()
    )


def steps_of(run: str) -> list[dict[str, Any]]:
    return [e for e in read_metrics(files.run_dir(run) / "metrics.jsonl") if e["kind"] == "step"]


def scale_of(run: str, step: int) -> list[float]:
    kept: list[float] = json.loads((checkpoint_format.folder_of(run, step) / "state.json").read_text())[
        "loss_scale"
    ]
    return kept


def test_the_factor_halves_on_overflow_and_doubles_after_calm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "GROWTH_STEPS", 3)
    scale, loss = LossScale(torch.float16, CPU), torch.tensor(2.0)
    start, factors = scale.factor.item(), []
    for applied in (True, True, False, True, True, True, True):
        assert scale.adjust(torch.tensor(applied), loss).item() is not applied
        factors.append(scale.factor.item() / start)
    assert factors == [1, 1, 0.5, 0.5, 0.5, 1, 1]


def test_what_no_smaller_factor_mends_is_no_overflow() -> None:
    scale, held_back = LossScale(torch.float16, CPU), torch.tensor(False)
    assert not scale.adjust(held_back, torch.tensor(float("nan")))
    for _ in range(16):
        assert scale.adjust(held_back, torch.tensor(2.0))
    assert scale.factor == 1
    assert not scale.adjust(held_back, torch.tensor(2.0))
    assert not LossScale(torch.bfloat16, CPU).adjust(held_back, torch.tensor(2.0))


def test_gradients_come_back_exactly() -> None:
    w = torch.tensor([3.0, -7e-5], requires_grad=True)
    (want,) = torch.autograd.grad((w**3).sum(), w)
    scale = LossScale(torch.float16, CPU)
    scale.up((w**3).sum()).backward()
    scale.down([w])
    assert torch.equal(w.grad, want)


def test_fp16_follows_fp32(tmp_path: Path) -> None:
    tiny_corpus(tmp_path)
    train_in(FP16, run="half", num_iterations=12, save_every=0)
    train_in(FP32, run="full", num_iterations=12, save_every=0)
    for half, full in zip(steps_of("half"), steps_of("full"), strict=True):
        assert half["loss"] == pytest.approx(full["loss"], abs=0.005)
        assert half["grad_norm"] == pytest.approx(full["grad_norm"], rel=0.05)


def test_overflows_are_skipped_said_and_resumed_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_corpus(tmp_path)
    monkeypatch.setattr(loss_scale, "START", 2.0**38)  # overflows until it is some powers of two smaller
    train_in(FP16, run="whole")
    skipped = [entry["step"] for entry in steps_of("whole") if entry["grad_norm"] is None]
    assert skipped[:2] == [0, 1]
    assert len(skipped) < 12
    assert capsys.readouterr().out.count("fp16 gradients overflowed") == len(skipped)
    assert scale_of("whole", 12) == [2.0 ** (38 - len(skipped)), 11 - skipped[-1]]
    for at in (1, 9):  # while it overflows at every step, and later
        with monkeypatch.context() as patch:
            stop_after(at, patch)
            assert train_in(FP16, run=f"parts{at}")["status"] == "stopped"
        train_in(FP16, run=f"parts{at}", resume="auto")
        assert weights(f"parts{at}", 12) == weights("whole", 12)
        assert scale_of(f"parts{at}", 12) == scale_of("whole", 12)


def test_a_gradient_that_never_fits_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_corpus(tmp_path)
    real = train_run.create_state

    def with_bad_gradient(*args: Any) -> Any:
        state = real(*args)
        state.model.head.weight.register_hook(lambda grad: grad * float("inf"))
        return state

    monkeypatch.setattr(train_run, "create_state", with_bad_gradient)
    with pytest.raises(UserError, match="step 16: loss .* not finite"):
        train_in(FP16, num_iterations=30)


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((6, 1), "float32"), ((7, 0), "float16"), ((7, 5), "float16"), ((8, 0), "bfloat16")],
)
def test_the_dtype_follows_the_gpu(
    capability: tuple[int, int], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert str(choose_dtype(torch.device("cuda"))[0]) == f"torch.{dtype}"
