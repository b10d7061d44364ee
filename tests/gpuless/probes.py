"""What is asked of a pretended H100, one question a process; the answer is a line of JSON.

Tensors are torch's fake ones: they have a shape, a dtype, a layout and a device, and no values, so every rule
that an operator checks is checked, and reading a value fails.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat.common.machine import Precision
from nanochat.config import plan as planning
from nanochat.config.arguments import TrainArgs
from nanochat.data.train_loader import Batch
from nanochat.distributed.world import World
from nanochat.model.gpt import GPT
from nanochat.optim.loss_scale import LossScale
from nanochat.optim.muon_adamw import MuonAdamW
from nanochat.optim.rates import MatrixOptions
from nanochat.train import memory, run

GPU = torch.device("cuda:0")
VOCABULARY = 32_768
PAGE = 512  # bytes that an allocation is rounded to


class Watch(TorchDispatchMode):
    """Counts what crosses between host and device, and the bytes of storages that are alive on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.crossings: Counter[str] = Counter()
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func)
        tensors = [t for t in _pytree.tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        if name == "aten._local_scalar_dense.default":
            self.crossings["a value is read: .item(), bool() or int()"] += 1
        if ("copy" in name or name.startswith("aten._to")) and len({t.device.type for t in tensors}) > 1:
            self.crossings[name] += 1
        for tensor in _pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cuda":
                self.see(tensor)
        return out

    def see(self, tensor: torch.Tensor) -> None:
        """Count the storage of a tensor until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.alive:
            self.alive[key] = -(-storage.nbytes() // PAGE) * PAGE
            self.now += self.alive[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self.alive.pop(key, 0)


def steps(asked: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers of `step` for several sets of arguments, in one process."""
    return [step(**arguments) for arguments in asked]


def step(depth: int, ranks: int = 8, backend: str = "sdpa", **flags: Any) -> dict[str, Any]:
    """One whole `train_step` of the first of several ranks: crossings, and gigabytes beside the estimate."""
    plan = planning.plan(TrainArgs(depth=depth, **flags), VOCABULARY, ranks)
    world = fake_world(ranks)
    with fake_tensors():
        state = fake_state(plan, world, backend)
        model, optimizer = state.model, state.optimizer
        watch = Watch()
        for tensor in (*model.parameters(), *model.buffers(), *optimizer_tensors(optimizer)):
            watch.see(tensor)
        with watch:
            run.train_step(plan, state, world)
    needed = memory.estimate(plan, plan.device_batch_size, torch.bfloat16, "cuda")
    return {"crossings": watch.crossings, "peak_gb": watch.peak / 1e9, "estimate_gb": needed.total / 1e9}


@functools.cache
def fake_tensors() -> FakeTensorMode:
    """The mode that makes them: one a process, for masks and tables are kept from one model to the next."""
    return FakeTensorMode()


def fake_world(ranks: int) -> World:
    """The first of several ranks, whose collectives do nothing."""
    if not dist.is_initialized():
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    world = World(rank=0, size=ranks, device=GPU, backend="nccl")
    World.any_rank = lambda self, flag: flag  # type: ignore[method-assign] # ranks agree over gloo, on the host
    return world


def fake_state(plan: planning.Plan, world: World, backend: str, micro_batches: int = 0) -> Any:
    """What a training step needs, without values: model, optimizer, and a loader of the same micro-batch.

    Args:
        plan: of the run.
        world: the ranks.
        backend: of attention.
        micro_batches: of a step; by default the plan's, at most two.
    """
    model = fake_model(plan, backend)
    options = MatrixOptions(plan.polar_norm_factor)
    params, kinds = dict(model.named_parameters()), model.parameter_kinds()
    optimizer = MuonAdamW(params, kinds, plan.groups, world, torch.bfloat16, options)
    ids = torch.zeros(plan.device_batch_size, plan.model.sequence_len, dtype=torch.int64, device=GPU)
    pairs = [Batch(ids, ids)] * (micro_batches or min(2, plan.grad_accum_steps))
    loader = SimpleNamespace(next_batch=lambda: pairs, metrics={})
    scale = LossScale(torch.bfloat16, GPU)
    return SimpleNamespace(step=1, model=model, optimizer=optimizer, loader=loader, loss_scale=scale)


def fake_model(plan: planning.Plan, backend: str) -> GPT:
    """The model of a plan on the device, without values."""
    with GPU:
        bos = 0 if plan.model.document_mask else None
        model = GPT(plan.model, Precision(torch.bfloat16, backend, plan.args.fp8, plan.args.fp8_head), bos)
    model.recompute = plan.args.recompute
    return model


def optimizer_tensors(optimizer: MuonAdamW) -> list[torch.Tensor]:
    """All moments that a rank holds."""
    found = []
    for shard in optimizer.shards:
        held = vars(shard) | (vars(shard.rule) if hasattr(shard, "rule") else {})
        found += [t for t in _pytree.tree_leaves(list(held.values())) if isinstance(t, torch.Tensor)]
    return found


def graphs(backend: str, windows: int = 1, halvings: int = 0, **flags: Any) -> dict[str, Any]:
    """Graphs that Dynamo makes of the forward pass, in training and in evaluation, with none broken.

    Args:
        backend: of attention.
        windows: stages of attention windows.
        halvings: how often memory runs out, which halves the rows and compiles anew.
        flags: of the plan.
    """
    import torch._dynamo

    made: list[str] = []

    def count(module: torch.fx.GraphModule, inputs: Any) -> Any:
        made.append("graph")
        return module.forward

    real = torch.compile
    torch.compile = lambda function, **options: real(function, backend=count, fullgraph=True, **options)
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    plan = planning.plan(TrainArgs(depth=4, **flags), VOCABULARY, 8)
    counts = []
    with fake_tensors():
        model = fake_model(plan, backend)
        for halving in range(halvings + 1):
            rows = 8 >> halving
            model.compile_for(rows)
            ids = torch.zeros(rows, plan.model.sequence_len, dtype=torch.int64, device=GPU)
            for stage in range(1, windows + 1):
                model.use_windows(plan.model.windows_at(stage / windows))
                model._hidden(ids)
                with torch.no_grad():
                    model._hidden(ids)
                counts.append(len(made))
    return {
        "graphs": len(made),
        "counts": counts,
        "breaks": dict(torch._dynamo.utils.counters["graph_break"]),
    }
