"""One path for one rank and for many: alone a collective is the identity; on gloo it is what it says."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from nanochat import world
from nanochat.errors import UserError
from nanochat.world import World
from tests.conftest import REPO


def test_alone_every_collective_is_the_identity() -> None:
    with world.join("cpu") as w:
        assert w == World.solo("cpu")
        assert w.all_reduce_sum(torch.tensor([3.0])).item() == 3.0
        assert w.agree(True)
        assert not w.agree(False)
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
