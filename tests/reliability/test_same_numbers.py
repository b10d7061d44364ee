"""P15, P16, P18, P19: a tracker cannot hurt, numbers stay, old checkpoints load, other runs are refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat.checkpoint import format as checkpoint_format
from nanochat.checkpoint import state as checkpoint_state
from nanochat.checkpoint.resume import require_same_run
from nanochat.common import files
from nanochat.common.errors import UserError
from nanochat.common.machine import Precision
from nanochat.config import plan as planning
from nanochat.data import corpus as corpus_module
from nanochat.tokenizer.tokenizer import Tokenizer
from nanochat.train import wandb_log
from tests.conftest import REPO
from tests.dist.launch import digest, lines, losses
from tests.dist.world import run_ranks, train_rank
from tests.reliability.figures import MakeFigure
from tests.tiny import read_metrics, tiny_args, tiny_corpus, tokenizer_named, train_tiny, write_text

GOLDEN = REPO / "dev" / "golden" / "d2-cpu-seed0.json"
OLD = REPO / "tests" / "data" / "checkpoints"
FP32 = Precision(torch.float32, "sdpa")


@pytest.fixture(autouse=True)
def corpus(tmp_path: Path) -> None:
    tiny_corpus(tmp_path)


# ----------------------------------------------------------------------------------------------------
# P16


def golden() -> dict[str, Any]:
    """Twenty steps, as dev/golden keeps them; this module run with a spare folder writes them anew."""
    train_tiny(run="golden", num_iterations=20)
    weights = (checkpoint_format.folder_of("golden", 20) / checkpoint_format.MODEL).read_bytes()
    return {
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "losses": [loss.hex() for loss in losses("golden")],
        "weights": hashlib.sha256(weights).hexdigest(),
    }


def test_the_numbers_are_those_of_before(figure: MakeFigure) -> None:
    want, got = json.loads(GOLDEN.read_text()), golden()
    same = (want["torch"], want["cpu"]) == (got["torch"], got["cpu"])  # other kernels round otherwise
    figure("P16", "20 losses of one run beside dev/golden" + (", bit for bit" if same else ", 2e-6"))
    for old, new in zip(want["losses"], got["losses"], strict=True):
        assert float.fromhex(new) == pytest.approx(float.fromhex(old), abs=2e-6)
    if same:
        assert got == want


def at_once(world: Any) -> None:
    train_rank(dataclasses.replace(world, rank=0, size=1, backend=None), {"run": f"at{world.rank}"}, None)


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_two_runs_at_once_are_equal(tmp_path: Path, figure: MakeFigure) -> None:
    figure("P16", "two runs at once, beside each other: bit for bit")
    run_ranks(2, tmp_path, at_once)
    assert lines("at0", "") == lines("at1", "")
    assert digest("at0", 12) == digest("at1", 12)


# ----------------------------------------------------------------------------------------------------
# P15


RUN = """
class Run:
    def log(self, *args, **options):
        {log}
    def finish(self):
        {finish}
def init(**options):
    return Run()
"""
BAD_WANDB = {
    "absent": None,
    "broken on import": "raise OSError('no space left')",
    "init raises": "def init(**options):\n    raise ConnectionError('no server')",
    "log raises": RUN.format(log="raise OSError('full')", finish="pass"),
    "finish raises": RUN.format(log="pass", finish="raise OSError('gone')"),
    "init hangs": "import time\ndef init(**options):\n    time.sleep(60)",
    "log hangs": RUN.format(log="__import__('time').sleep(60)", finish="pass"),
    "init exits": "import sys\ndef init(**options):\n    sys.exit(3)",
    "init kills": "import os\ndef init(**options):\n    os.kill(os.getpid(), 9)",
    "log holds the interpreter": RUN.format(log="__import__('re').match('(a+)+b', 'a' * 40)", finish="pass"),
    "finish hangs": RUN.format(log="pass", finish="__import__('time').sleep(60)"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(BAD_WANDB))
def test_a_tracker_that_fails_costs_no_step(
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    figure: MakeFigure,
) -> None:
    figure("P15", f"wandb {kind}: no step lost, said once")
    text = BAD_WANDB[kind]
    monkeypatch.setattr(wandb_log, "FINISH_S", 0.5)
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "wandb.py").write_text(text or "raise ImportError('No module named wandb')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"), prepend=os.pathsep)
    train_tiny(run="with", wandb="offline")
    said = capsys.readouterr().out
    assert said.count("going on without it") == 1
    train_tiny(run="without")
    assert lines("with", "") == lines("without", "")
    assert digest("with", 12) == digest("without", 12)
    assert read_metrics(files.run_dir("with") / "metrics.jsonl")


# ----------------------------------------------------------------------------------------------------
# P18


def test_checkpoints_of_every_release_load(figure: MakeFigure) -> None:
    read = figure("P18", "checkpoints of older commits read")
    releases = sorted(path.name for path in OLD.iterdir())
    assert releases
    for release in releases:
        with read.trial(release):
            load_release(release)


def load_release(release: str) -> None:
    """Load a checkpoint and compare its logits with those that were kept beside it."""
    shutil.copytree(OLD / release, files.run_dir(release))
    shutil.copytree(files.run_dir(release) / "tokenizer", files.tokenizer_dir(f"of-{release}"))
    expected = files.read_json(files.run_dir(release) / "expected.json")
    model, _, meta = checkpoint_state.load_model(release, device=torch.device("cpu"), precision=FP32)
    logits = model.logits(torch.tensor([expected["ids"]]))[0, -1, :8]
    assert logits.tolist() == pytest.approx(expected["logits"], abs=1e-5)
    assert meta["made_by"].startswith("nanochat ")
    checkpoint_format.read_tensors(
        checkpoint_format.folder_of(release, meta["step"]) / checkpoint_format.OPTIMIZER
    )


def test_a_checkpoint_of_a_later_format_says_which_release_made_it() -> None:
    train_tiny()
    folder = checkpoint_format.folder_of("tiny", 12)
    meta = files.read_json(folder / "state.json")
    files.write_json(folder / "state.json", {**meta, "format": 2, "made_by": "nanochat 9.0"})
    with pytest.raises(UserError, match=r"format 2, made by 'nanochat 9\.0'"):
        checkpoint_format.read_state(folder)


# ----------------------------------------------------------------------------------------------------
# P19


FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "depth": ({"depth": 3}, "model.n_layer: 2 then, 3 now"),
    "width": ({"aspect_ratio": 24}, "model.n_embd: 32 then, 48 now"),
    "heads": ({"head_dim": 8}, "model.head_dim: 16 then, 8 now"),
    "context": ({"max_seq_len": 64}, "model.sequence_len: 32 then, 64 now"),
    "window": ({"window_pattern": "L"}, "model.window_pattern: 'SSSL' then, 'L' now"),
    "recipe": (
        {"recipe": "nanochat-2026-01"},
        "model.recipe: 'nanochat-2026-07' then, 'nanochat-2026-01' now",
    ),
    "attention": ({"attention_kind": "diff2"}, "model.attention_kind: 'softmax' then, 'diff2' now"),
    "pairs": ({"bigram": True}, "model.bigram: False then, True now"),
    "seed": ({"seed": 1}, "--seed: 0 then, 1 now"),
    "tails": ({"keep_tails": True}, "--keep-tails: False then, True now"),
    "batch": ({"total_batch_size": 512}, "batch_tokens: 256 then, 512 now"),
    "horizon": ({"num_iterations": 13}, "steps: 12 then, 13 now"),
    "optimizer": ({"matrix_optimizer": "soap"}, "groups.matrix.optimizer: 'muon' then, 'soap' now"),
    "bases": ({"soap_every": 5}, "--soap-every: 10 then, 5 now"),
    "learning rate": ({"embedding_lr": 0.5}, "groups.embedding.lr: "),
    "warmup": ({"warmup_steps": 3}, "schedule.warmup_steps: "),
    "corpus": ({}, "corpus hash: "),
    "tokenizer": ({}, "tokenizer hash: "),
}


def test_a_field_that_came_after_a_checkpoint_has_its_default_there() -> None:
    train_tiny()
    folder = checkpoint_format.folder_of("tiny", 12)
    meta = files.read_json(folder / "state.json")
    plan = planning.plan(tiny_args(), Tokenizer.load(files.tokenizer_dir("local")).vocab_size)
    for name in ("window_pattern", "recipe"):
        del meta["plan"]["model"][name]
    del meta["plan"]["args"]["keep_tails"]
    assert require_same_run(meta, plan, meta["fingerprints"], folder) == []
    january = dataclasses.replace(plan, model=dataclasses.replace(plan.model, recipe="nanochat-2026-01"))
    with pytest.raises(UserError, match=r"model\.recipe: 'nanochat-2026-07' then, 'nanochat-2026-01' now"):
        require_same_run(meta, january, meta["fingerprints"], folder)


def test_a_run_with_another_plan_text_or_tokenizer_is_refused_with_both_values(
    tmp_path: Path, figure: MakeFigure
) -> None:
    fields = figure("P19", "fields of a plan, corpus, tokenizer: refused with both values")
    train_tiny()
    before = digest("tiny", 12)
    for name, (changes, said) in FIELDS.items():
        if name == "corpus":
            before_corpus = files.data_dir("local").rename(tmp_path / "kept")
            corpus_module.prepare("local", named_files=[str(write_text(tmp_path / "other", seed=1))])
        if name == "tokenizer":
            shutil.rmtree(files.data_dir("local"))
            before_corpus.rename(files.data_dir("local"))
            Tokenizer.train(["other text, of the same size"], 300).save(files.tokenizer_dir("local"))
        with fields.trial(name):
            with pytest.raises(UserError) as refused:
                train_tiny(resume="auto", **changes)
            assert said in str(refused.value)
            assert " then, " in str(refused.value)
    assert digest("tiny", 12) == before


if __name__ == "__main__":
    tiny_corpus(Path(sys.argv[1]))
    tokenizer_named("local")
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(golden(), indent=1) + "\n")
