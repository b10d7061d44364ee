"""One path for one rank and for many: alone a collective is the identity; on gloo it is what it says."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from nanochat.common.errors import UserError
from nanochat.distributed import world
from nanochat.distributed.world import World
from tests.conftest import REPO


def test_alone_every_collective_is_the_identity() -> None:
    with world.join("cpu") as w:
        assert w == World.single_process("cpu")
        assert w.all_reduce_sum(torch.tensor([3.0])).item() == 3.0
        assert w.any_rank(True)
        assert not w.any_rank(False)
        w.barrier()


def test_absent_device_is_refused_by_name() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(UserError, match="--device-type=cuda: not available"), world.join("cuda"):
        pass


def test_unusable_rank_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "zero")
    with pytest.raises(UserError, match="RANK='zero'"), world.join("cpu"):
        pass


def meet_all(store: dist.TCPStore, size: int) -> list[dist.PrefixStore]:
    """Every rank meets the others, in threads and on a connection of its own; the last rank comes first."""
    with ThreadPoolExecutor(size) as pool:
        coming = [
            pool.submit(world.rendezvous, store.clone(), rank, size, timeout_s=30.0)
            for rank in reversed(range(size))
        ]
        return [each.result() for each in reversed(coming)]


def test_a_restart_reads_nothing_that_an_earlier_start_left_in_the_store() -> None:
    kept = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    for start in range(6):
        stores = meet_all(kept, 4)
        assert not any(store.check(["address"]) for store in stores)
        stores[start % 4].set("address", str(start))
        assert [store.get("address") for store in stores] == [str(start).encode()] * 4


def test_a_rank_that_does_not_come_is_named() -> None:
    kept = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(UserError, match=r"rank 0: rank 1, 2 of 3 did not join within 0\.2 s"):
        world.rendezvous(kept, 0, 3, timeout_s=0.2)
    meet_all(kept, 2)
    with pytest.raises(UserError, match="rank 1: rank 0 of 2 did not join"):
        world.rendezvous(kept, 1, 2, timeout_s=0.2)


def test_two_ranks_under_torchrun() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, str(REPO / "tests" / "dist" / "world_script.py")],
        capture_output=True,
        text=True,
        cwd=REPO,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("main rank of 2 says this once") == 1
