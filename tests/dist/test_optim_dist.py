"""The optimizer gives the same parameters and state on 1, 2, 3 and 5 ranks over gloo; the wire in bf16."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch._dynamo.testing
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch.testing._internal.distributed.fake_pg import FakeStore

from nanochat.optim.rates import MatrixOptions
from nanochat.optim.muon_adamw import MuonAdamW
from nanochat.distributed.collectives import mean_scatter
from nanochat.distributed.world import World
from tests.test_optim import GROUPS, NORM_FACTOR, OPTIONS, moments_held, random_problem, schedule
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


def mean_in_bf16(world, tensors):
    """This rank's part of the mean of tensors, one a rank."""
    return mean_scatter(tensors[world.rank].to(torch.bfloat16), world).wait()


def check_mean(world):
    size, generator = world.size, torch.Generator().manual_seed(0)
    own = slice(4 * world.rank, 4 * (world.rank + 1))
    whole = [torch.randint(-255, 256, (4 * size, 3), generator=generator).float() for _ in range(size)]
    got = mean_in_bf16(world, whole)
    assert got.dtype == torch.float32
    assert torch.equal(got, torch.stack(whole).sum(0)[own] / size)
    # Beside 1,024 a sum in bf16 loses 1.
    steep = [torch.full((4 * size, 3), 1024.0 if rank == 0 else 1.0) for rank in range(size)]
    assert torch.equal(mean_in_bf16(world, steep), torch.full((4, 3), (1024.0 + size - 1) / size))
    some = [torch.randn(4 * size, 3, generator=generator) for _ in range(size)]
    got = mean_in_bf16(world, some)
    rounded = torch.stack([x.to(torch.bfloat16).float() for x in some]).sum(0)[own] / size
    torch.testing.assert_close(got, rounded, rtol=1e-6, atol=1e-7)
    assert torch.equal(got, mean_in_bf16(world, some))


def some_steps(world, dtype):
    """Parameters after three steps on the mean of 12 gradients each, which are shared out over the ranks."""
    params, kinds = random_problem()
    optimizer = MuonAdamW(params, kinds, GROUPS, world, torch.float32, OPTIONS, dtype)
    for step in range(3):
        for name, p in params.items():
            generator = torch.Generator().manual_seed(step * 100 + len(name))
            p.grad = torch.randn(12, *p.shape, generator=generator)[world.rank :: world.size].mean(0)
        assert optimizer.step(*schedule(step), index=step).applied
    return {name: p.detach() for name, p in params.items()}


def bf16_main(rank, size, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/bf16", rank=rank, world_size=size)
    world = World(rank, size, torch.device("cpu"), "gloo")
    check_mean(world)
    save_file(some_steps(world, torch.bfloat16), f"{folder}/bf16.{rank}.safetensors")
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [2, 4])
def test_gradients_in_bf16_are_added_up_in_fp32_and_ranks_agree_within_its_rounding(size, tmp_path):
    mp.start_processes(bf16_main, (size, tmp_path), nprocs=size, start_method="fork")
    alone, start = some_steps(World.single_process(), torch.float32), random_problem()[0]
    ranks = [load_file(tmp_path / f"bf16.{rank}.safetensors") for rank in range(size)]
    for name, p in alone.items():
        assert all(torch.equal(ranks[0][name], other[name]) for other in ranks)
        moved, apart = (p - start[name].detach()).norm(), (ranks[0][name] - p).norm()
        assert apart < 0.02 * moved, name
    assert any(not torch.equal(ranks[0][name], p) for name, p in alone.items())


def test_one_rank_rounds_no_gradient():
    plain, asked = (some_steps(World.single_process(), dtype) for dtype in (torch.float32, torch.bfloat16))
    assert all(torch.equal(plain[name], p) for name, p in asked.items())


@pytest.mark.parametrize(("size", "dtype"), [(1, torch.float32), (2, torch.float16)])
def test_one_rank_and_fp16_reduce_nothing_before_the_step(size, dtype):
    params, kinds = random_problem()
    world = World(0, size, torch.device("cpu"), None if size == 1 else "gloo")
    optimizer = MuonAdamW(params, kinds, GROUPS, world, dtype, OPTIONS)
    with optimizer.reductions.early():
        sum(p.sum() for p in params.values()).backward()
    optimizer.reductions.catch_up()
    assert all(p.grad is not None for p in params.values())


def test_reductions_that_begin_early_compile_no_graph_anew():
    counter = torch._dynamo.testing.CompileCounter()
    params, kinds = random_problem()
    function = torch.compile(lambda: sum(p.square().sum() for p in params.values()), backend=counter)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        world = World(0, 2, torch.device("cpu"), "gloo")
        optimizer = MuonAdamW(params, kinds, GROUPS, world, torch.float32, OPTIONS)
        for _ in range(2):
            function().backward()
            loss = function()
            assert all(p.grad is not None for p in params.values())
            with optimizer.reductions.early():
                loss.backward()
            assert all(p.grad is None for p in params.values())
            optimizer.reductions.abandon()
    finally:
        dist.destroy_process_group()
    assert counter.frame_count == 1
