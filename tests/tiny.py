"""A run small enough for a test: a corpus made here, its tokenizer, a model that steps in milliseconds."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat.common import files, run_files
from nanochat.common.machine import Precision
from nanochat.config import plan as planning
from nanochat.config.arguments import TrainArgs
from nanochat.data import corpus
from nanochat.data.corpus import Corpus
from nanochat.distributed.world import World
from nanochat.tokenizer.tokenizer import Tokenizer
from nanochat.train import run as train_run
from nanochat.train.stage import Pretraining


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without those that a crash has damaged."""
    return run_files.read_lines(path, run_files.MetricsLine, [])


TEXT = "the cat sat on a mat and saw two dogs near their red house while rain fell over green hills"
WORDS = TEXT.split()

TINY = TrainArgs(
    depth=2,
    run="tiny",
    corpus="local",
    max_seq_len=32,
    aspect_ratio=16,
    head_dim=16,
    total_batch_size=256,
    device_batch_size=4,
    num_iterations=12,
    eval_every=5,
    eval_tokens=512,
    sample_every=0,
    save_every=4,
    device_type="cpu",
    dtype="float32",
)


def write_text(folder: Path, documents: int = 400, seed: int = 0) -> Path:
    """A jsonl file of sentences that a small model can learn."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "text.jsonl"
    lines = (" ".join(rng.choices(WORDS, k=rng.randint(5, 60))) for _ in range(documents))
    path.write_text("".join(f'{{"text": "{line}."}}\n' for line in lines), "utf-8")
    return path


def tokenizer_named(name: str) -> Tokenizer:
    """Train and save a small tokenizer."""
    tokenizer = Tokenizer.train([" ".join(WORDS) + "."], 300)
    tokenizer.save(files.tokenizer_dir(name))
    return tokenizer


def tiny_args(**changes: object) -> TrainArgs:
    """TINY with some fields changed."""
    return dataclasses.replace(TINY, **changes)  # type: ignore[arg-type]


def tiny_corpus(tmp_path: Path) -> None:
    """Make the corpus "local" and its tokenizer in the base directory of the test."""
    text = write_text(tmp_path / "text")
    lines = text.read_text("utf-8").splitlines(keepends=True)
    # The split is named: golden losses are of the trainer, not of how a corpus holds text out.
    held = text.with_name("held.jsonl")
    held.write_text("".join(lines[-4:]), "utf-8")
    text.write_text("".join(lines[:-4]), "utf-8")
    corpus.prepare("local", named_files=[str(text)], val_file=str(held))
    tokenizer_named("local")


def train_tiny(**changes: object) -> dict[str, Any]:
    """Train TINY, or a variation of it, in this process; returns its summary."""
    args = tiny_args(**changes)
    tokenizer = Tokenizer.load(files.tokenizer_dir("local"))
    plan = planning.plan(args, tokenizer.vocab_size)
    return train_run.run(
        plan,
        Pretraining(Corpus.open("local"), tokenizer),
        Precision(torch.float32, "sdpa"),
        World.single_process(),
    )


def command_line(**changes: object) -> list[str]:
    """The flags that say to base_train what `train_tiny` says."""
    asked = dataclasses.asdict(tiny_args(**changes))
    return [
        f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
        for name, value in asked.items()
        if value is not None and value is not False and value != ""
    ]


def flags_of(args: Any) -> list[str]:
    """The flags that say to a command what differs in its arguments from their defaults."""
    usual, flags = dataclasses.asdict(type(args)()), list[str]()
    for name, value in dataclasses.asdict(args).items():
        if value != usual[name]:
            flags += [
                f"--{name.replace('_', '-')}",
                *map(str, value if isinstance(value, tuple) else [value]),
            ]
    return flags


def trained_base(folder: Path, **changes: object) -> Path:
    """A base directory below `folder` with the tiny corpus and a finished run of TINY or a variation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder / "base"))
        tiny_corpus(folder)
        train_tiny(**changes)
    return folder / "base"
