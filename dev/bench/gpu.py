"""What needs CUDA: attention backends, and training steps of d12 and d20 in bf16 and fp8, on one GPU.

    python -m dev.bench.gpu [--json FILE]

Tokens are random: none of the figures depends on them. A step is a whole global batch, its update included.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nanochat.common import files, machine
from nanochat.common.errors import UserError, cli
from nanochat.common.machine import Precision
from nanochat.config import plan as planning
from nanochat.config.arguments import TrainArgs
from nanochat.config.plan import Plan
from nanochat.distributed.world import World
from nanochat.model.attention import attention
from nanochat.model.attention_backends import available_backends
from nanochat.model.gpt import GPT
from nanochat.optim.muon_adamw import MuonAdamW
from nanochat.optim.rates import MatrixOptions

T, VOCAB = 2048, 32768
DEPTHS = (12, 20)
STEPS = 2  # timed, after one that compiles
CUDA = torch.device("cuda")


def timed(work: Callable[[], object], times: int) -> float:
    """Median seconds of `work` on the GPU, after one run that is not counted."""
    work()
    seconds = []
    for _ in range(times):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def row(metric: str, value: float, unit: str, **setting: object) -> dict[str, Any]:
    """One figure of ours; no peer runs here."""
    peer = {"peer": None, "theirs": None, "ratio": None}
    return {"metric": metric, **peer, "ours": value, "unit": unit, **setting}


def attention_rows(backend: str) -> list[dict[str, Any]]:
    """Forward and backward of a layer of d20, 16 rows and 10 heads of 128: short and full window."""
    rows = []
    for window in (512, T):
        shape = (16, T, 10, 128)
        q, k, v = (torch.randn(shape, device=CUDA, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
        grad = torch.randn_like(q)

        def work(window: int = window, qkv: Any = (q, k, v), grad: Any = grad) -> None:
            torch.autograd.grad(attention(*qkv, window=window, backend=backend), qkv, grad)

        rows.append(row("attention_time", timed(work, 10), "s", backend=backend, window=window))
    return rows


def step_rows(depth: int, backend: str, fp8: bool, peak_flops_per_s: float) -> list[dict[str, Any]]:
    """Step time, tokens/s, MFU and memory; where memory runs out the micro-batch is halved."""
    plan = planning.plan(TrainArgs(depth=depth, max_seq_len=T), VOCAB)
    rows_at_once = plan.device_batch_size
    while True:
        try:
            seconds, memory = measure_step(plan, rows_at_once, Precision(torch.bfloat16, backend, fp8))
            break
        except torch.OutOfMemoryError:
            if rows_at_once == 1:
                raise
        rows_at_once //= 2
        free_memory()
    free_memory()
    tokens_per_s = plan.batch_tokens / seconds
    setting = {"depth": depth, "backend": backend, "dtype": "fp8" if fp8 else "bf16", "rows": rows_at_once}
    return [
        row("step_time", seconds, "s", **setting),
        row("tokens_per_second", tokens_per_s, "tokens/s", **setting),
        row("mfu", tokens_per_s * plan.flops_per_token / peak_flops_per_s, "share of bf16 peak", **setting),
        row("peak_memory", memory, "bytes", **setting),
    ]


def measure_step(plan: Plan, rows: int, precision: Precision) -> tuple[float, float]:
    """Seconds of a step and bytes at its peak."""
    with torch.device("meta"):
        model = GPT(plan.model, precision)
    model.to_empty(device=CUDA)
    model.init_weights(0)
    model.compile_for(rows)
    params, kinds = dict(model.named_parameters()), model.parameter_kinds()
    options = MatrixOptions(plan.polar_norm_factor)
    optimizer = MuonAdamW(params, kinds, plan.groups, World.single_process(), torch.bfloat16, options)
    ids, targets = torch.randint(0, VOCAB, (2, rows, T), device=CUDA).unbind()
    micro_batches = plan.batch_rows // rows

    def step() -> None:
        for _ in range(micro_batches):
            (model.loss(ids, targets) / micro_batches).backward()
        optimizer.step(0.01, 0.95, 0.0)

    torch.cuda.reset_peak_memory_stats()
    return timed(step, STEPS), torch.cuda.max_memory_allocated()


def free_memory() -> None:
    """Give back what the last measurement held."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


def run() -> list[dict[str, Any]]:
    """Every backend in bf16; fp8 with the first, where the GPU has it."""
    backends = [name for name, reason in available_backends(CUDA).items() if not reason]
    speed = machine.speed(CUDA, torch.bfloat16)
    rows = [
        row("peak_flops", speed.peak_flops, f"FLOP/s ({speed.peak_source})"),
        row("matmul_flops", speed.matmul_flops, "FLOP/s"),
    ]
    for backend in backends:
        rows += attention_rows(backend)
    for depth in DEPTHS:
        for backend in backends:
            rows += step_rows(depth, backend, False, speed.peak_flops)
        if torch.cuda.get_device_capability(CUDA) >= (9, 0):
            rows += step_rows(depth, backends[0], True, speed.peak_flops)
    return rows


@cli
def main() -> None:
    """Measure, print every figure as it stands in the JSON, and write it where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise UserError("no CUDA: nothing to measure. Run it on a machine with an NVIDIA GPU.")
    rows = run()
    for found in rows:
        named = (name for name in ("depth", "backend", "dtype", "window") if name in found)
        setting = ", ".join(f"{name} {found[name]}" for name in named)
        print(f"{found['metric']:20}{found['ours']:18,.4f}  {found['unit']:20}{setting}")
    if args.json:
        files.write_json(args.json, {"machine": machine.describe(CUDA), "rows": rows})


if __name__ == "__main__":
    main()
