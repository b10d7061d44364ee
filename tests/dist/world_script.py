"""Run by torchrun in test_world.py: every collective of World, checked on each rank."""

from __future__ import annotations

import torch

from nanochat.distributed import world


def main() -> None:
    with world.join("cpu", timeout_s=60) as w:
        assert w.backend == "gloo"
        assert w.is_main == (w.rank == 0)
        total = w.all_reduce_sum(torch.tensor([1.0, float(w.rank)]))
        assert total.tolist() == [w.size, w.size * (w.size - 1) / 2]
        assert w.any_rank(w.rank == w.size - 1)
        assert not w.any_rank(False)
        w.barrier()
        w.print0(f"main rank of {w.size} says this once")


if __name__ == "__main__":
    main()
