"""Attention backend and compute dtype of a machine: what it can run, which it gets, and why.

The order is fixed, fastest first where it can run at all; every rank takes the same one.
"""

from __future__ import annotations

import contextlib
import importlib.util

import torch

from nanochat.common.errors import UserError
from nanochat.common.machine import Precision, choose_dtype, require_fp8
from nanochat.distributed.world import World
from nanochat.model.attention import BACKENDS

# By CUDA backend: the module that it needs, and the GPUs it runs on, in words and by compute capability.
# FlashAttention 4 shares the folder flash_attn, and has not this module of it.
NEEDS = {
    "fa3": ("flash_attn_interface", "a Hopper GPU (sm90)", range(9, 10)),
    "fa2": ("flash_attn.flash_attn_interface", "an Ampere GPU (sm80) or later", range(8, 100)),
    "flex": ("triton", "sm70 or later for Triton", range(7, 100)),
}
FLASH_DTYPES = (torch.bfloat16, torch.float16)


def available_backends(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> dict[str, str]:
    """For each backend, why it cannot run here, or "" if it can."""
    return {name: _obstacle(name, device, dtype) if name in NEEDS else "" for name in BACKENDS}


def _obstacle(name: str, device: torch.device, dtype: torch.dtype) -> str:
    module, gpus, majors = NEEDS[name]
    if device.type != "cuda":
        return f"needs a CUDA GPU, the device is {device.type}"
    if name != "flex" and dtype not in FLASH_DTYPES:
        return f"needs bf16 or fp16, the compute dtype is {dtype}"
    major, minor = torch.cuda.get_device_capability(device)
    if major not in majors:
        return f"needs {gpus}, this is sm{major}{minor}"
    with contextlib.suppress(ModuleNotFoundError):  # of the folder that it is in
        if importlib.util.find_spec(module):
            return ""
    return f"the module {module} is not installed"


def choose_backend(
    device: torch.device,
    requested: str = "auto",
    dtype: torch.dtype = torch.bfloat16,
    world: World | None = None,
) -> tuple[str, str]:
    """The backend to use and the reason, for printing once.

    Args:
        device: where the model runs.
        requested: "auto" or one of BACKENDS.
        dtype: the compute dtype; the flash packages take bf16 and fp16 only.
        world: the ranks that take the same backend; by default this process alone.

    Raises:
        UserError: the name is unknown, or that backend cannot run here.
    """
    if requested not in ("auto", *BACKENDS):
        raise UserError(
            f"--attention={requested}: no such backend, expected auto or one of {', '.join(BACKENDS)}. "
            "Use --attention=auto."
        )
    obstacles = available_backends(device, dtype)
    if requested != "auto":
        if obstacles[requested]:
            raise UserError(
                f"--attention={requested}: not available here: {obstacles[requested]}. "
                "Install what is missing or use --attention=auto."
            )
        return requested, "as asked"
    world = world or World.single_process(device)
    name = next(name for name in BACKENDS if not world.any_rank(bool(obstacles[name])))
    faster = BACKENDS[: BACKENDS.index(name)]
    return name, "; ".join(f"{other}: {obstacles[other] or 'not on every rank'}" for other in faster) or (
        "the fastest for this GPU"
    )


def choose_precision(
    device: torch.device,
    dtype: str = "auto",
    backend: str = "auto",
    fp8: bool = False,
    world: World | None = None,
) -> tuple[Precision, str]:
    """How a model computes on a device, and a line that says why.

    Args:
        device: where the model runs.
        dtype: the value of --dtype.
        backend: the value of --attention.
        fp8: the value of --fp8.
        world: the ranks that take the same backend.

    Raises:
        UserError: one of them is unknown, or not available here.
    """
    compute_dtype, dtype_reason = choose_dtype(device, dtype)
    if fp8:
        require_fp8(device, compute_dtype)
        dtype_reason += ", wide linear layers in fp8 while training"
    name, reason = choose_backend(device, backend, compute_dtype, world)
    line = f"computing in {compute_dtype} ({dtype_reason}), attention by {name} ({reason})"
    return Precision(compute_dtype, name, fp8), line
