"""Which attention backend and dtype a machine gets, and why: by what it has, and by a short measurement."""

from __future__ import annotations

import importlib.util

import torch

from nanochat.attention import BACKENDS
from nanochat.errors import UserError
from nanochat.hardware import Precision, choose_dtype, require_fp8


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
    device: torch.device, requested: str = "auto", dtype: torch.dtype = torch.bfloat16
) -> tuple[str, str]:
    """The backend to use and the reason, for printing once.

    Args:
        device: where the model runs.
        requested: "auto" or one of BACKENDS.
        dtype: the compute dtype; the flash packages take bf16 and fp16 only.

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
    name = next(name for name in BACKENDS if not reasons[name])
    passed_over = [f"{other}: {reasons[other]}" for other in BACKENDS[: BACKENDS.index(name)]]
    return name, "; ".join(passed_over) or "the fastest for this GPU"


def choose_precision(
    device: torch.device, dtype: str = "auto", backend: str = "auto", fp8: bool = False
) -> tuple[Precision, str]:
    """How a model computes on a device, and a line that says why.

    Args:
        device: where the model runs.
        dtype: what --dtype asks for.
        backend: what --attention asks for.
        fp8: what --fp8 asks for.

    Raises:
        UserError: one of them is unknown, or cannot be had here.
    """
    compute_dtype, dtype_reason = choose_dtype(device, dtype)
    if fp8:
        require_fp8(device, compute_dtype)
        dtype_reason += ", wide linear layers in fp8 while training"
    name, reason = choose_backend(device, backend, compute_dtype)
    line = f"computing in {compute_dtype} ({dtype_reason}), attention by {name} ({reason})"
    return Precision(compute_dtype, name, fp8), line
