"""Which attention backend and dtype a machine gets, and why: by what it has, and by a short measurement."""

from __future__ import annotations

import importlib.util
from functools import partial

import torch

from nanochat.common.errors import UserError
from nanochat.common.machine import Precision, choose_dtype, require_fp8
from nanochat.distributed.world import World
from nanochat.model.attention import BACKENDS
from nanochat.model.attention_autotune import AttentionShape, fastest, gpu_milliseconds, key_of


def available_backends(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> dict[str, str]:
    """For each backend, why it cannot run here, or "" if it can."""
    reasons = dict.fromkeys(BACKENDS, "")
    if device.type != "cuda":
        missing = f"needs a CUDA GPU, the device is {device.type}"
        return reasons | {"fa3": missing, "fa2": missing, "flex": missing}
    major, minor = torch.cuda.get_device_capability(device)
    arch = f"sm{major}{minor}"
    if dtype not in (torch.bfloat16, torch.float16):
        reasons["fa3"] = reasons["fa2"] = f"needs bf16 or fp16, the compute dtype is {dtype}"
    elif major != 9:
        reasons["fa3"] = f"needs a Hopper GPU (sm90), this is {arch}"
    elif importlib.util.find_spec("flash_attn_interface") is None:
        reasons["fa3"] = "the package flash_attn_interface is not installed"
    if not reasons["fa2"] and major < 8:
        reasons["fa2"] = f"needs an Ampere GPU (sm80) or later, this is {arch}"
    elif not reasons["fa2"] and importlib.util.find_spec("flash_attn") is None:
        reasons["fa2"] = "the package flash_attn is not installed"
    if major < 7:
        reasons["flex"] = f"needs sm70 or later for Triton, this is {arch}"
    elif importlib.util.find_spec("triton") is None:
        reasons["flex"] = "the package triton is not installed"
    return reasons


def choose_backend(
    device: torch.device,
    requested: str = "auto",
    dtype: torch.dtype = torch.bfloat16,
    shape: AttentionShape | None = None,
    world: World | None = None,
) -> tuple[str, str]:
    """The backend to use and the reason, for printing once.

    Args:
        device: where the model runs.
        requested: "auto" or one of BACKENDS.
        dtype: the compute dtype; the flash packages take bf16 and fp16 only.
        shape: of the attention in training, where several possible backends are measured; without it the
            first in the order of BACKENDS is taken.
        world: the ranks that take the same backend; by default this process alone.

    Raises:
        UserError: the name is unknown, or that backend cannot run here.
    """
    if requested not in ("auto", *BACKENDS):
        raise UserError(
            f"--attention={requested}: no such backend, expected auto or one of {', '.join(BACKENDS)}. "
            "Use --attention=auto."
        )
    reasons = available_backends(device, dtype)
    if requested != "auto":
        if reasons[requested]:
            raise UserError(
                f"--attention={requested}: not available here: {reasons[requested]}. "
                "Install what is missing or use --attention=auto."
            )
        return requested, "as asked"
    world = world or World.single_process(device)
    possible = [name for name in BACKENDS if not world.any_rank(bool(reasons[name]))]
    if shape is not None and len(possible) > 1:
        clock = partial(gpu_milliseconds, shape=shape, dtype=dtype, device=device)
        return fastest(possible, clock, key_of(shape, dtype, device), world)
    name = possible[0]
    passed_over = [
        f"{other}: {reasons[other] or 'not on every rank'}" for other in BACKENDS[: BACKENDS.index(name)]
    ]
    return name, "; ".join(passed_over) or "the fastest for this GPU"


def choose_precision(
    device: torch.device,
    dtype: str = "auto",
    backend: str = "auto",
    fp8: bool = False,
    shape: AttentionShape | None = None,
    world: World | None = None,
) -> tuple[Precision, str]:
    """How a model computes on a device, and a line that says why.

    Scoring and generation give no shape: their passes are of many lengths and forward only, so that no one
    measurement would tell which backend is theirs.

    Args:
        device: where the model runs.
        dtype: what --dtype asks for.
        backend: what --attention asks for.
        fp8: what --fp8 asks for.
        shape: of the attention in training, for the measurement of backends.
        world: the ranks that take the same backend.

    Raises:
        UserError: one of them is unknown, or cannot be had here.
    """
    compute_dtype, dtype_reason = choose_dtype(device, dtype)
    if fp8:
        require_fp8(device, compute_dtype)
        dtype_reason += ", wide linear layers in fp8 while training"
    name, reason = choose_backend(device, backend, compute_dtype, shape, world)
    line = f"computing in {compute_dtype} ({dtype_reason}), attention by {name} ({reason})"
    return Precision(compute_dtype, name, fp8), line
