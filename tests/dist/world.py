"""A world of forked ranks over gloo, in 0.3 s: torchrun takes five.

They are forked from a server that has imported all and run nothing: a process that has compiled a model has
threads of autograd, and forks of it cannot train.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nanochat.config import plan as planning
from nanochat.train import run as train_run
from nanochat.data.corpus import Corpus
from nanochat.common.files import tokenizer_dir
from nanochat.common.machine import Precision
from nanochat.tokenizer.tokenizer import Tokenizer
from nanochat.distributed.world import World
from nanochat.train.stage import Pretraining
from tests.tiny import tiny_args, train_tiny


def _rank(
    rank: int,
    size: int,
    meet: str,
    environment: dict[str, str],
    action: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)  # first of all: a forked process must not enter the parent's OpenMP pool
    os.environ.update(environment)  # the server's is of the first test
    limit = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=size, timeout=limit)
    action(World(rank, size, torch.device("cpu"), "gloo"), *args)
    dist.destroy_process_group()


def run_ranks(size: int, folder: Path, action: Callable[..., Any], *args: Any) -> None:
    """Call action(world, *args) on so many ranks."""
    meet = folder / f"meet{len(list(folder.glob('meet*')))}"
    multiprocessing.set_forkserver_preload([__name__])
    everything = (size, str(meet), dict(os.environ), action, args)
    mp.start_processes(_rank, everything, nprocs=size, start_method="forkserver")


def train_rank(world: World, changes: dict[str, Any], stop_at: int | None) -> None:
    """Train the tiny run on this rank; a preemption asks the last rank to stop after `stop_at` steps."""
    if stop_at is not None and world.rank == world.size - 1:
        real_step = train_run.train_step

        def step(plan: Any, state: Any, *rest: Any) -> Any:
            if state.step == stop_at - 1:
                signal.raise_signal(signal.SIGTERM)
            return real_step(plan, state, *rest)

        train_run.train_step = step
    tokenizer = Tokenizer.load(tokenizer_dir("local"))
    plan = planning.plan(tiny_args(**changes), tokenizer.vocab_size, world.size)
    train_run.run(plan, Pretraining(Corpus.open("local"), tokenizer), Precision(torch.float32, "sdpa"), world)


def train_world(size: int, folder: Path, stop_at: int | None = None, **changes: Any) -> None:
    """Train the tiny run, or a variation, on so many ranks."""
    if size == 1 and stop_at is None:
        train_tiny(**changes)
    else:
        run_ranks(size, folder, train_rank, changes, stop_at)
