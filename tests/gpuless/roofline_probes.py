"""The measurements of dev.bench.gpu at their full size, on the pretended H100."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dev.bench import gpu_figures
from nanochat.common import machine
from nanochat.common.machine import Speed
from tests.gpuless.probes import GPU

PARTS: dict[str, dict[str, Any]] = {
    "machine_rates": {},
    "fp8_rates": {},
    "loss_of_tokens": {"depth": 24},
    "mlp": {"depth": 24, "dtype": "fp8"},
    "attention_kernel": {"depth": 24, "backend": "sdpa"},
    "optimizer_update": {"depth": 4},
}


def figures() -> dict[str, list[str]]:
    """The metrics of each measurement of a part; all of its work is done once, on tensors without values."""

    def once(device: torch.device, work: Callable[[], object], times: int = 1) -> float:
        work()
        return 1.0

    gpu_figures.timed = once
    machine.speed = lambda device, dtype: Speed(989e12, "table", 700e12)  # which reads a value
    machine.choose_compile = lambda device, requested="auto": (False, "nothing is compiled here")
    found = {}
    for name, setting in PARTS.items():
        with FakeTensorMode():
            found[name] = [row["metric"] for row in gpu_figures.FIGURES[name](GPU, **setting)]
    return found
