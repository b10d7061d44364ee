"""Bytes that a training step moves and kernels that it launches, from Inductor's code for an H100.

Bytes of a fused kernel are those of the buffers that it reads and writes, each once: what is left by a cache
that loses nothing while a kernel runs.
"""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nanochat.common.machine import Precision
from nanochat.config import plan as planning
from nanochat.config.arguments import TrainArgs
from nanochat.model.gpt import GPT
from tests.gpuless import inductor
from tests.gpuless.eager import Counter, is_product
from tests.gpuless.probes import GPU, VOCABULARY

RANKS = 8


def traffic(
    depth: int,
    fp8: bool = False,
    backend: str = "fa3",
    top: int = 12,
    vocabulary: int = VOCABULARY,
    **flags: Any,
) -> dict[str, Any]:
    """Bytes and kernels of the loss of one micro-batch and of its gradients, compiled and not.

    Args:
        depth: of the model.
        fp8: of the plan.
        backend: of attention.
        top: how many groups of fused kernels are listed, largest first.
        vocabulary: of the model.
        flags: others of the plan.

    Returns:
        "shape": rows, tokens, width and vocabulary of the micro-batch, and micro-batches a step;
        "graphs": of each compiled graph, see `summary`;
        "eager": launches and gigabytes of what runs uncompiled, by phase and operator;
        "totals": gigabytes by phase without products and attention, bytes a logit of the loss, launches.
    """
    started = time.perf_counter()
    plan = planning.plan(TrainArgs(depth=depth, fp8=fp8, **flags), vocabulary, RANKS)
    with inductor.watched() as watch, FakeTensorMode():
        model = compiled_model(plan, backend)
        ids = torch.zeros(plan.device_batch_size, plan.model.sequence_len, dtype=torch.int64, device=GPU)
        counter = Counter()
        enter_phases(model, watch, counter)
        with counter:
            loss = model.loss(ids, ids)
            counter.phase = watch.phase = "backward"
            loss.backward()
    shape = {
        "rows": ids.size(0),
        "tokens": ids.numel(),
        "width": plan.model.n_embd,
        "vocabulary": plan.model.vocab_size,
        "micro_batches": plan.grad_accum_steps,
    }
    graphs = [summary(graph, top) for graph in watch.graphs]
    eager = counter.by_phase()
    return {
        "shape": shape,
        "totals": totals(watch.graphs, eager, ids.numel() * plan.model.vocab_size),
        "graphs": graphs,
        "eager": eager,
        "seconds": round(time.perf_counter() - started, 1),
    }


def compiled_model(plan: planning.Plan, backend: str) -> GPT:
    """The model of a plan on the device, without values, whose passes are compiled."""
    with GPU:
        bos = 0 if plan.model.document_mask else None
        model = GPT(plan.model, Precision(torch.bfloat16, backend, plan.args.fp8), bos)
    model.recompute = plan.args.recompute
    model.compile_for(plan.device_batch_size)
    return model


def enter_phases(model: GPT, watch: inductor.Watch, counter: Counter) -> None:
    """Let a model tell whether its layers are running, or the loss that follows them."""
    run = model._hidden

    def hidden(ids: torch.Tensor) -> torch.Tensor:
        counter.phase = watch.phase = "forward"
        out = run(ids)
        counter.phase = watch.phase = "loss"
        return out

    model._hidden = hidden  # type: ignore[method-assign]


def summary(graph: inductor.Graph, top: int) -> dict[str, Any]:
    """Launches and gigabytes by kind, of opaque kernels by name, and the largest groups of fused ones."""
    kinds: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    opaque: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    fused: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for kernel in graph.kernels:
        places = [kinds[kernel.kind]]
        if kernel.name:
            places.append(opaque[kernel.name])
        if kernel.kind in inductor.FUSED:
            places.append(fused[kernel.origins])
        for place in places:
            place[0] += 1
            place[1] += kernel.bytes
    largest = sorted(fused.items(), key=lambda item: -item[1][1])[:top]
    return {
        "phase": phase_of(graph),
        "calls": graph.calls,
        "kinds": _rows(kinds),
        "opaque": _rows(opaque),
        "top": [{"gb": count / 1e9, "launches": n, "from": origins} for origins, (n, count) in largest],
    }


def phase_of(graph: inductor.Graph) -> str:
    """The phase in which a graph runs: the backward pass is compiled together with the forward pass."""
    return "backward" if graph.is_backward else graph.phase


def _rows(found: dict[str, list[int]]) -> dict[str, dict[str, float]]:
    return {name: {"launches": n, "gb": count / 1e9} for name, (n, count) in sorted(found.items())}


def totals(
    graphs: list[inductor.Graph], eager: dict[str, dict[str, dict[str, float]]], logits: int
) -> dict[str, float]:
    """Gigabytes that do not belong to products or attention, by phase, and all launches."""
    out: dict[str, float] = defaultdict(float)
    for graph in graphs:
        phase = phase_of(graph)
        for kernel in graph.kernels:
            out["launches"] += graph.calls
            if kernel.kind in inductor.FUSED:
                out[f"{phase}_fused_gb"] += graph.calls * kernel.bytes / 1e9
                out[f"{phase}_fused_kernels"] += graph.calls
            elif kernel.kind == "triton":
                out[f"{phase}_triton_gb"] += graph.calls * kernel.bytes / 1e9
    for phase, operators in eager.items():
        for name, row in operators.items():
            out["launches"] += row["launches"]
            if not is_product(name):
                out[f"{phase}_eager_gb"] += row["gb"]
    loss = sum(out.get(f"loss_{kind}_gb", 0.0) for kind in ("fused", "triton", "eager"))
    out["loss_bytes_a_logit"] = loss * 1e9 / logits
    return dict(out)
