"""One step within an address space that cannot hold it: python -m tests.memory_script MIB."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import torch

from nanochat.common import files
from nanochat.common.machine import Precision
from nanochat.config import plan as planning
from nanochat.data.corpus import Corpus
from nanochat.distributed.world import World
from nanochat.tokenizer.tokenizer import Tokenizer
from nanochat.train import run as train_run
from nanochat.train.stage import Pretraining
from tests.tiny import tiny_args

SHAPE = {"max_seq_len": 128, "aspect_ratio": 64, "total_batch_size": 32 * 128, "device_batch_size": 32}


def main() -> None:
    """Two steps, the second with so many MiB more than are in use; prints the losses and the rows."""
    torch.set_num_threads(1)
    tokenizer = Tokenizer.load(files.tokenizer_dir("local"))
    plan = planning.plan(tiny_args(**SHAPE), tokenizer.vocab_size)
    world, precision = World.single_process(), Precision(torch.float32, "sdpa")
    state = train_run.create_state(plan, Pretraining(Corpus.open("local"), tokenizer), precision, world)
    losses = [train_run.train_step(plan, state, world).loss.item()]
    state.step = 1
    if spare := int(sys.argv[1]):
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (in_use + (spare << 20),) * 2)
    losses += [train_run.train_step(plan, state, world).loss.item() for _ in range(2)]
    print(json.dumps({"losses": losses, "rows": state.loader.device_batch_size, "end": state.loader.epoch}))
    state.loader.close()


if __name__ == "__main__":
    main()
