"""Bytes that a training step moves and kernels that it launches, from Inductor's code for an H100.

Bytes of a fused kernel are those of the buffers that it reads and writes, each once: what is left by a cache
that loses nothing while a kernel runs. Kinds of kernels:

    fused       written by Inductor: elementwise passes, reductions, casts, lookups
    template    flex attention, as Inductor writes it
    triton      passes by Triton kernels of this project within a compiled graph
    products    products of matrices, by cuBLAS
    attention   operators of a package or of torch, by their names
    operators   products of this project with something fused to them
    eager       passes outside of a compiled graph, by torch or by Triton kernels of this project
    wire        collectives

A step moves what its micro-batches move together, copies and update (see `step`).
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import torch
import torch._dynamo

from nanochat.config import plan as planning
from nanochat.config.arguments import TrainArgs
from nanochat.model.gpt import GPT
from nanochat.train import run
from tests.gpuless import inductor, sass
from tests.gpuless.eager import Counter
from tests.gpuless.probes import GPU, VOCABULARY, fake_model, fake_state, fake_tensors, fake_world

RANKS = 8
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm")
# Operators of this project that memory bounds; the others are products with something fused to them.
PASSES = ("quantize_both", "turned", "gather_rows", "add_rows", "add_gradients", "softcapped_losses")
ATTENTION = re.compile("attention|attn|flash|fa[234]|varlen")
# Rows of the answers: launches and bytes by phase and kind.
Rows = dict[str, dict[str, list[int]]]


def traffic(
    depth: int, fp8: bool = False, backend: str = "fa3", top: int = 12, **flags: Any
) -> dict[str, Any]:
    """Bytes and kernels of the loss of one micro-batch and of its gradients, compiled and not.

    Args:
        depth: of the model.
        fp8: of the plan.
        backend: of attention.
        top: how many groups of fused kernels are listed a phase, largest first.
        flags: others of the plan.

    Returns:
        "shape": of the micro-batch;
        "phases": launches and gigabytes by phase ("forward", "loss", "backward") and kind;
        "loss_bytes_a_logit": of all that is no product;
        "by_name": launches and gigabytes by phase and name of what has a name: opaque kernels, Triton kernels
        of ours, operators that run uncompiled;
        "top": by phase, groups of fused kernels of the same origins.
    """
    plan = planning.plan(TrainArgs(depth=depth, fp8=fp8, **flags), VOCABULARY, RANKS)
    watch = inductor.watched()
    with fake_tensors():
        model = fake_model(plan, backend)
        model.compile_for(plan.device_batch_size)
        ids = torch.zeros(plan.device_batch_size, plan.model.sequence_len, dtype=torch.int64, device=GPU)
        name_phases(model, watch)
        with Counter(watch) as counter:
            model.loss(ids, ids).backward()
    rows = by_kind(watch, counter)
    loss = sum(count for kind, (_, count) in rows["loss"].items() if kind != "products")
    return {
        "shape": shape_of(plan, backend),
        "loss_bytes_a_logit": loss / ids.numel() / plan.model.vocab_size,
        "phases": in_gigabytes(rows),
        "by_name": in_gigabytes(by_name(watch, counter)),
        "top": largest(watch, top),
    }


def steps(asked: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers of `step` for several sets of arguments, in one process."""
    return [step(**arguments) for arguments in asked]


def step(
    depth: int, fp8: bool = False, backend: str = "fa3", updates: bool = True, **flags: Any
) -> dict[str, Any]:
    """Bytes and kernels of a whole training step of the first of 8 ranks, model and updates compiled.

    Args:
        depth: of the model.
        fp8: of the plan.
        backend: of attention.
        updates: count the updates too, which take a third of the time at depth 4.
        flags: others of the plan.

    Returns:
        "shape": of a micro-batch, and how many make a step;
        "batches": launches and gigabytes of all micro-batches together, two at least, by phase ("forward",
        "loss", "backward") and kind;
        "copies": by kind, of the copies of weights that products read, once a step;
        "update": by kind, of what else a step does once, with `updates`.
    """
    plan = planning.plan(TrainArgs(depth=depth, fp8=fp8, **flags), VOCABULARY, RANKS)
    world, watch = fake_world(RANKS), inductor.watched()
    watch.graphs.clear()  # of the steps before
    torch._dynamo.reset()
    with fake_tensors():
        count = max(2, plan.grad_accum_steps)
        state = fake_state(plan, world, backend, micro_batches=count)
        state.model.compile_for(plan.device_batch_size)
        if updates:
            state.optimizer.compile_updates()
        watch.phase = "update"
        name_phases(state.model, watch)
        within(watch, "update", state.optimizer, "step")
        within(watch, "update", state.optimizer.reductions, "_begin_next")
        with Counter(watch) as counter:
            run.train_step(plan, state, world)
    found = in_gigabytes(by_kind(watch, counter))
    once = {phase: found.pop(phase) for phase in ("copies", "update")}
    shape = shape_of(plan, backend) | {"micro_batches": count}
    return {"shape": shape, "batches": found, "copies": once["copies"]} | (
        {"update": once["update"]} if updates else {}
    )


def within(watch: inductor.Watch, phase: str, owner: Any, name: str) -> None:
    """Let a method of an object run in a phase of its own."""
    method = getattr(owner, name)

    def renamed(*args: Any, **options: Any) -> Any:
        before, watch.phase = watch.phase, phase
        try:
            return method(*args, **options)
        finally:
            watch.phase = before

    setattr(owner, name, renamed)


def cubins(depth: int, fp8: bool = False, backend: str = "fa3", **flags: Any) -> dict[str, Any]:
    """Triton kernels of the loss, of its gradients and of the updates, assembled for sm_90.

    Args:
        depth: of the model.
        fp8: of the plan.
        backend: of attention.
        flags: others of the plan.

    Returns:
        how many "kernels" there are, and "cubins" of their configurations; most "registers" of a thread and
        bytes of "shared" memory of any; and the kernels which are "spilling" in every configuration, with
        the fewest bytes of a thread's stack.
    """
    plan = planning.plan(TrainArgs(depth=depth, fp8=fp8, **flags), VOCABULARY, RANKS)
    world, watch = fake_world(RANKS), inductor.watched(assemble=True)
    with fake_tensors():
        state = fake_state(plan, world, backend, micro_batches=1)
        state.model.compile_for(plan.device_batch_size)
        state.optimizer.compile_updates()
        run.train_step(plan, state, world)
    used = {key: [sass.resources(cubin) for cubin, _ in found] for key, found in watch.cubins.items()}
    every = [usage for found in used.values() for usage in found]
    stacks = {name: min(usage["STACK"] for usage in found) for (_, name), found in used.items()}
    return {
        "kernels": len(used),
        "cubins": len(every),
        "registers": max(usage["REG"] for usage in every),
        "shared": max(shared for found in watch.cubins.values() for _, shared in found),
        "spilling": {name: stack for name, stack in stacks.items() if stack},
    }


def shape_of(plan: planning.Plan, backend: str) -> dict[str, Any]:
    """What figures were counted at."""
    return {
        "depth": plan.model.n_layer,
        "width": plan.model.n_embd,
        "vocabulary": plan.model.vocab_size,
        "rows": plan.device_batch_size,
        "tokens": plan.device_batch_size * plan.model.sequence_len,
        "micro_batches": plan.grad_accum_steps,
        "ranks": RANKS,
        "attention": backend,
    }


def name_phases(model: GPT, watch: inductor.Watch) -> None:
    """Let a model tell which phase of a step runs."""
    run_layers, loss_of = model._hidden, model.loss

    def hidden(ids: torch.Tensor) -> torch.Tensor:
        watch.phase = "forward"
        out = run_layers(ids)
        watch.phase = "loss"
        return out

    def loss(*args: Any, **options: Any) -> torch.Tensor:
        out = loss_of(*args, **options)
        watch.phase = "backward"
        return out

    model._hidden = hidden  # type: ignore[method-assign]
    model.loss = loss  # type: ignore[method-assign]
    for layer in model.linears:
        within(watch, "copies", layer, "refresh")


def kind_of(name: str) -> str:
    """The kind of an operator, compiled or not, by its full name."""
    space, _, rest = name.rpartition("::") if "::" in name else name.partition(".")
    if rest.split(".")[0] in PRODUCTS:
        return "products"
    if space == "nanochat" and rest.split(".")[0] in PASSES:
        return "passes"
    if ATTENTION.search(name):
        return "attention"
    return {"aten": "eager", "_c10d_functional": "wire", "c10d": "wire"}.get(space, "operators")


def by_kind(watch: inductor.Watch, counter: Counter) -> Rows:
    """[launches, bytes] by phase and kind."""
    rows: Rows = defaultdict(lambda: defaultdict(lambda: [0, 0]))
    for phase, kernel, calls in kernels(watch):
        kind = "fused" if kernel.kind in inductor.FUSED else kernel.kind
        if kind == "extern":
            found = kind_of(kernel.name)
            found = "triton" if found == "passes" else found
            kind = found if found in ("products", "attention", "triton") else "operators"
        add(rows[phase][kind], calls, kernel.bytes)
    for (phase, name), (launches, count) in counter.found.items():
        kind = kind_of(name)
        add(rows[phase]["eager" if kind == "passes" else kind], launches, count, once=True)
    return rows


def by_name(watch: inductor.Watch, counter: Counter) -> Rows:
    """[launches, bytes] by phase and name, of what has one."""
    rows: Rows = defaultdict(lambda: defaultdict(lambda: [0, 0]))
    for phase, kernel, calls in kernels(watch):
        if kernel.name:
            add(rows[phase][f"compiled {kernel.name}"], calls, kernel.bytes)
    for (phase, name), (launches, count) in counter.found.items():
        add(rows[phase][name], launches, count, once=True)
    return rows


def largest(watch: inductor.Watch, top: int) -> dict[str, list[dict[str, Any]]]:
    """By phase, the groups of fused kernels that move most."""
    rows: Rows = defaultdict(lambda: defaultdict(lambda: [0, 0]))
    for phase, kernel, calls in kernels(watch):
        if kernel.kind in inductor.FUSED:
            add(rows[phase][kernel.origins], calls, kernel.bytes)
    return {
        phase: [
            {"gb": round(count / 1e9, 3), "kernels": launches, "from": origins}
            for origins, (launches, count) in sorted(groups.items(), key=lambda item: -item[1][1])[:top]
        ]
        for phase, groups in rows.items()
    }


def kernels(watch: inductor.Watch) -> list[tuple[str, inductor.Kernel, int]]:
    """Phase, kernel and calls, of all that was compiled and called."""
    return [(p, k, n) for graph in watch.graphs for p, n in graph.calls.items() for k in graph.kernels]


def add(row: list[int], launches: int, count: int, once: bool = False) -> None:
    """Count launches and their bytes: of each, or of all together."""
    row[0] += launches
    row[1] += count if once else launches * count


def in_gigabytes(rows: Rows) -> dict[str, dict[str, dict[str, float]]]:
    """Rows as they are written down."""
    return {
        phase: {
            name: {"kernels": n, "gb": round(count / 1e9, 4)} for name, (n, count) in sorted(found.items())
        }
        for phase, found in rows.items()
    }
