"""The optimizer on a pretended H100: what a step sends between ranks, and what SOAP multiplies in."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from nanochat.common.machine import Precision
from nanochat.config import plan as planning
from nanochat.config.arguments import TrainArgs
from nanochat.config.plan import GroupPlan
from nanochat.distributed.world import World
from nanochat.model.gpt import GPT
from nanochat.optim import soap as soap_module
from nanochat.optim.muon_adamw import MuonAdamW
from nanochat.optim.rates import MatrixOptions, StepRates
from nanochat.optim.soap import Soap, find_basis, renew_basis, soap_update
from tests.gpuless.probes import GPU, VOCABULARY

# What a rank sends to others, of its W parts of `full` bytes: all but its own; of a sum over all, twice that.
SENT = {"reduce_scatter_tensor": 1, "all_to_all_single": 1, "all_gather_into_tensor": 1, "all_reduce": 2}


def wire(depth: int, ranks: int = 8) -> dict[str, dict[str, int]]:
    """Bytes that a rank sends in a step, by collective and dtype, with gradients in fp32 and in bf16."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    world = World(rank=0, size=ranks, device=GPU, backend="nccl")
    sent: Counter[str] = Counter()

    def counted(name: str, real: Any) -> Any:
        def call(*tensors: Any, **options: Any) -> Any:
            full = max(tensors[:2], key=lambda tensor: tensor.nbytes)
            sent[f"{name} {full.dtype}"] += SENT[name] * full.nbytes * (ranks - 1) // ranks
            return real(*tensors, **options)

        return call

    for name in SENT:
        setattr(dist, name, counted(name, getattr(dist, name)))
    found = {}
    for dtype in ("float32", "bfloat16"):
        plan = planning.plan(TrainArgs(depth=depth, grad_reduce_dtype=dtype), VOCABULARY, ranks)
        with FakeTensorMode():
            with GPU:
                model = GPT(plan.model, Precision(torch.bfloat16, "sdpa"))
            params, options = dict(model.named_parameters()), MatrixOptions(plan.polar_norm_factor)
            rest = (model.parameter_kinds(), plan.groups, world, torch.bfloat16, options)
            MuonAdamW(params, *rest, getattr(torch, dtype)).step(1.0, 0.95, 0.0, index=1)
        found[dtype] = dict(sent)
        sent.clear()
    return found


def soap() -> dict[str, Any]:
    """The precision of fp32 products on CUDA within SOAP's updates and between them, and the graphs made.

    Updates on CUDA, those on CUDA that are compiled, without a break, and those on a CPU.
    """
    switch = torch.backends.cuda.matmul
    precision: dict[str, list[str]] = {name: [] for name in ("update", "find_basis", "renew_basis", "after")}
    graphs: list[str] = []

    def noted(name: str, function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            precision[name].append(switch.fp32_precision)
            assert switch.allow_tf32 == (switch.fp32_precision == "tf32")  # else a product may refuse
            return function(*args, **options)

        return call

    def count(module: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append("graph")
        return module.forward

    options: dict[str, Any] = {"backend": count, "fullgraph": True, "dynamic": False}
    compiled = torch.compile(soap_update, **options)
    soap_module.find_basis = noted("find_basis", find_basis)
    soap_module.renew_basis = noted("renew_basis", renew_basis)
    cpu = torch.device("cpu")
    for device, update in ((GPU, soap_update), (GPU, compiled), (cpu, soap_update)):
        with FakeTensorMode():
            like = torch.zeros(3, 256, 512, device=device)
            one, ok = torch.ones((), device=device), torch.ones((), dtype=torch.bool, device=device)
            rule = Soap(
                like, GroupPlan("soap", 0.01, 0.95, 0.9, 1e-8, 0.1), torch.bfloat16, MatrixOptions(1.0)
            )
            rule.function = noted("update", update)
            for index in (0, 1, 10):
                rule.update(like, torch.zeros_like(like), StepRates(index, 1.0, 0.1, one, one, one, ok))
                precision["after"].append(switch.fp32_precision)
    return {"precision": precision, "graphs": len(graphs)}
