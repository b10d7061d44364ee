"""Run by torchrun in test_dataloader.py: digests of global batches and the state, from the main rank."""

from __future__ import annotations

import hashlib
import json
import sys

import torch

from nanochat.distributed import world
from nanochat.data.train_loader import TrainLoader
from nanochat.data.corpus import Corpus
from tests.test_dataloader import ROWS, Letters, T, rows_of


def main() -> None:
    corpus, steps, state = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    with world.join("cpu", timeout_s=60) as w:
        loader = TrainLoader(
            Corpus.open(corpus),
            Letters(),
            sequence_len=T,
            rows_per_batch=ROWS,
            streams=4,
            seed=3,
            world=w,
            device_batch_size=2,
        )
        if state:
            loader.load_state_dict(state)
        digests = []
        for _ in range(steps):
            batch = torch.zeros(ROWS, T + 1, dtype=torch.int64)
            batch[w.rank :: w.size] = torch.from_numpy(rows_of(loader.next_batch()))
            digests.append(hashlib.sha256(w.all_reduce_sum(batch).numpy().tobytes()).hexdigest())
        w.print0(json.dumps({"digests": digests, "state": loader.state_dict()}))


if __name__ == "__main__":
    main()
