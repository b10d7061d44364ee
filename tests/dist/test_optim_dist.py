"""The optimizer gives the same parameters and state on 1, 2, 3 and 5 ranks over gloo."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

from nanochat.optim.rates import MatrixOptions
from nanochat.optim.muon_adamw import MuonAdamW
from nanochat.distributed.world import World
from tests.test_optim import GROUPS, NORM_FACTOR, moments_held, random_problem, schedule
from tests.test_soap import ADAMW, SOAP

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks: 0.3 s a world, 5 s if spawned")
SAMPLES = 30  # gradients a step, shared out over the ranks


OPTIMIZERS = {"muon": GROUPS["matrix"], "soap": SOAP, "adamw": ADAMW}


def create(params, world, matrix):
    groups = {**GROUPS, "matrix": OPTIMIZERS[matrix]}
    options = MatrixOptions(NORM_FACTOR, soap_every=3)
    return MuonAdamW(params, random_problem()[1], groups, world, torch.float32, options)


def train(world, matrix, first, last, bad_at=None):
    """Steps on the mean of SAMPLES random gradients; returns parameters, optimizer and results.

    At step 0 all samples of SOAP are the same whole numbers: of a Gram matrix of low rank every basis of the
    null space is right, and rounding, which the number of ranks changes, would choose one.
    """
    params, _ = random_problem()
    optimizer = create(params, world, matrix)
    results = []
    for step in range(first, last):
        for name, p in params.items():
            grads = torch.randn(
                SAMPLES, *p.shape, generator=torch.Generator().manual_seed(step * 100 + len(name))
            )
            if step == 0 and matrix == "soap":
                grads = (4 * grads[:1]).round().expand_as(grads)
            p.grad = grads[world.rank :: world.size].mean(0)
        if step == bad_at and world.rank == world.size - 1:
            params["b"].grad[0, 0] = float("nan")
        result = optimizer.step(*schedule(step), index=step)
        results.append((result.grad_norm.item(), result.applied.item()))
    return params, optimizer, results


def rank_main(rank, size, folder, matrix):
    torch.set_num_threads(1)  # first of all: a forked process must not enter the parent's OpenMP pool
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    world = World(rank, size, torch.device("cpu"), "gloo")
    params, optimizer, results = train(world, matrix, 0, 5, bad_at=2)
    state = optimizer.state_tensors()
    # The state of all ranks, loaded into a fresh optimizer, gives the same state again.
    fresh = create(params, world, matrix)
    fresh.load_state_tensors(state)
    assert all(torch.equal(t, state[name]) for name, t in fresh.state_tensors().items())
    save_file({n: p.detach() for n, p in params.items()} | state, f"{folder}/rank{rank}.safetensors")
    report = {"results": results, "held": moments_held(optimizer)}
    Path(f"{folder}/rank{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("matrix", OPTIMIZERS)
def test_any_number_of_ranks_gives_the_parameters_and_state_of_one(size, matrix, tmp_path):
    mp.start_processes(rank_main, (size, tmp_path, matrix), nprocs=size, start_method="fork")
    params, optimizer, results = train(World.single_process(), matrix, 0, 5, bad_at=2)
    want = {n: p.detach() for n, p in params.items()} | optimizer.state_tensors()
    ranks = [load_file(tmp_path / f"rank{r}.safetensors") for r in range(size)]
    for got in ranks:
        assert got.keys() == want.keys()
        for name, tensor in want.items():
            torch.testing.assert_close(got[name], tensor, rtol=1e-5, atol=1e-6)
            assert torch.equal(got[name], ranks[0][name])
    for r in range(size):
        report = json.loads((tmp_path / f"rank{r}.json").read_text())
        # At most one matrix of padding a shape, of few.
        assert report["held"] <= 1.3 * moments_held(optimizer) / size + 100
        assert [applied for _, applied in report["results"]] == [True, True, False, True, True]
        for (norm, applied), (want_norm, _) in zip(report["results"], results, strict=True):
            assert not applied or norm == pytest.approx(want_norm, rel=1e-5)
