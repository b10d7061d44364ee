"""Attention backend and compute dtype of a machine: what it can run, which it gets, and why.

The order is fixed by the kind of GPU, fastest first where it can run at all; every rank takes the same one.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
from functools import lru_cache

import torch
from torch.nn import attention as torch_attention

from nanochat.common.errors import UserError
from nanochat.common.machine import Precision, choose_dtype, require_fp8
from nanochat.config.model_config import GPTConfig
from nanochat.distributed.world import World
from nanochat.model.attention import BACKENDS, PACKED, Layout, attention, downloaded_kernels
from nanochat.model.sdpa_attention import MIN_STACKED_CHUNK

# Fastest first, by the compute capability from which it holds, of the oldest GPU among the ranks; 0 is none.
# Windows are at flash speed with fa3, fa2 and varlen, in blocks of 128 with flex, in masked chunks with sdpa.
ORDERS = {
    10: ("varlen", "fa2", "flex", "sdpa"),
    9: ("fa3", "varlen", "fa2", "flex", "sdpa"),
    8: ("fa2", "varlen", "flex", "sdpa"),
    7: ("flex", "sdpa"),
    0: ("sdpa",),
}
# By CUDA backend, the GPUs it runs on, in words and by compute capability.
NEEDS = {
    "fa3": ("a Hopper GPU (sm90)", range(9, 10)),
    "fa2": ("an Ampere GPU (sm80) or later", range(8, 100)),
    "varlen": ("an Ampere GPU (sm80) or later", range(8, 100)),
    "flex": ("sm70 or later for Triton", range(7, 100)),
}
# The module of a package. FlashAttention 4 shares the folder flash_attn with 2, without this module of it.
MODULES = {"fa3": "flash_attn_interface", "fa2": "flash_attn.flash_attn_interface"}
# FlashAttention 3 built for every torch from 2.9, of the package `kernels`; the version is of its interface.
FA3_ON_THE_HUB = ("kernels-community/flash-attn3", 1)
# FlashAttention that torch can call in place of its own: its name there, its module, and its GPUs.
IMPLEMENTATIONS = {
    "FA3": ("flash_attn_interface", range(9, 10)),
    "FA4": ("flash_attn.cute.interface", range(9, 11)),
}
FLASH_DTYPES = (torch.bfloat16, torch.float16)
# Keys a second of a kernel beside the dense causal flash kernel's. Estimated: no GPU has measured them yet.
FLEX_RATE, MASKED_RATE, FLEX_BLOCK = 0.75, 0.5, 128


def available_backends(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> dict[str, str]:
    """For each backend, why it cannot run here, or "" if it can."""
    return {name: _obstacle(name, device, dtype) for name in BACKENDS}


def _obstacle(name: str, device: torch.device, dtype: torch.dtype) -> str:
    if name == "sdpa":
        return ""
    gpus, majors = NEEDS[name]
    if device.type != "cuda":
        return f"needs a CUDA GPU, the device is {device.type}"
    if name in PACKED and torch.version.hip is not None:
        return "needs an NVIDIA GPU"
    if name in PACKED and dtype not in FLASH_DTYPES:
        return f"needs bf16 or fp16, the compute dtype is {dtype}"
    major, minor = torch.cuda.get_device_capability(device)
    if major not in majors:
        return f"needs {gpus}, this is sm{major}{minor}"
    if name == "flex":
        return "" if _is_installed("triton") else "the module triton is not installed"
    return _missing_in_torch() if name == "varlen" else _package_fault(name, device)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the folder that it is in
        return False


def _missing_in_torch() -> str:
    """What torch's attention for packed sequences lacks here, or "": it has had windows since 2.11."""
    wanted = {"window_size", "scale", "enable_gqa"}
    if _is_installed("torch.nn.attention.varlen"):
        from torch.nn.attention.varlen import varlen_attn

        wanted -= set(inspect.signature(varlen_attn).parameters)
    missing = ", ".join(sorted(wanted))
    return f"varlen_attn of torch {torch.__version__} lacks {missing}" if missing else ""


@lru_cache(maxsize=8)
def _package_fault(name: str, device: torch.device) -> str:
    """Why a package gives no kernel that runs, or "". It is loaded, fa3 also from the hub, and tried once.

    What is installed may be built for another torch or another GPU, and what is downloaded may not arrive;
    without a trial the first training step would be what finds it out.
    """
    if not _is_installed(MODULES[name]):
        if name != "fa3":
            return f"the module {MODULES[name]} is not installed"
        if not _is_installed("kernels"):
            return f"neither {MODULES[name]} nor kernels (the extra gpu) is installed"
    try:
        if not _is_installed(MODULES[name]):
            repository, version = FA3_ON_THE_HUB
            get_kernel = importlib.import_module("kernels").get_kernel
            downloaded_kernels[name] = get_kernel(repository, version=version)
        _try(name, device)
    except Exception as error:  # whatever a package of others raises, there is another backend
        downloaded_kernels.pop(name, None)
        return f"does not run here: {_brief(error)}"
    return ""


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def _try(name: str, device: torch.device) -> None:
    """Small passes by a backend, forward and backward: a window, then documents; two query heads a key head.

    Raises:
        FloatingPointError: a gradient is not finite. Besides, whatever the kernels raise.
    """
    with torch.enable_grad():
        q, k, v = (
            torch.ones(1, 256, heads, 64, dtype=torch.bfloat16, device=device, requires_grad=True)
            for heads in (2, 1, 1)
        )
        documents = Layout(boundaries=torch.arange(0, 257, 64, dtype=torch.int32, device=device))
        windowed = attention(q, k, v, window=100, backend=name)
        within = attention(q, k, v, window=256, backend=name, layout=documents)
        gradients = torch.autograd.grad((windowed + within).sum(), (q, k, v))
    if not math.isfinite(torch.stack([gradient.float().sum() for gradient in gradients]).sum().item()):
        raise FloatingPointError("gradients are not finite")


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
        dtype: the compute dtype; the flash kernels take bf16 and fp16 only.
        world: the ranks that take the same backend; by default this process alone.

    Raises:
        UserError: the name is unknown, or that backend cannot run here.
    """
    if requested not in ("auto", *BACKENDS):
        raise UserError(
            f"--attention={requested}: no such backend, expected auto or one of {', '.join(BACKENDS)}. "
            "Use --attention=auto."
        )
    world = world or World.single_process(device)
    if requested != "auto":
        if obstacle := _obstacle(requested, device, dtype):
            raise UserError(
                f"--attention={requested}: not available here: {obstacle}. "
                "Install what is missing or use --attention=auto."
            )
        return requested, "as asked" + _remarks(requested, device, world)
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    oldest = -world.max_over_ranks(-major)
    reasons = []
    for name in ORDERS[max(first for first in ORDERS if first <= oldest)]:
        obstacle = _obstacle(name, device, dtype)
        if not world.any_rank(bool(obstacle)):
            break
        reasons.append(f"{name}: {obstacle or 'not on every rank'}")
    best = "the fastest for this GPU" if oldest else f"others need a CUDA GPU, the device is {device.type}"
    return name, ("; ".join(reasons) or best) + _remarks(name, device, world)


def _remarks(name: str, device: torch.device, world: World) -> str:
    """What a backend does besides, as an addition to the reason for it."""
    if name in downloaded_kernels:
        return f"; from the hub, {FA3_ON_THE_HUB[0]} version {FA3_ON_THE_HUB[1]}"
    if name == "varlen":
        return _activate(device, world)
    return "; where a pass is not compiled, sdpa" if name == "flex" else ""


def _activate(device: torch.device, world: World) -> str:
    """Have torch call an installed FlashAttention 3 or 4 that runs on every rank; returns a remark, or ""."""
    if not hasattr(torch_attention, "activate_flash_attention_impl"):  # a torch before it
        return ""
    major, remark = torch.cuda.get_device_capability(device)[0], ""
    for name, (module, majors) in IMPLEMENTATIONS.items():
        installed, fault = major in majors and _is_installed(module), ""
        if installed:
            try:
                torch_attention.activate_flash_attention_impl(name)
                _try("varlen", device)
            except Exception as error:  # as for a package: torch's own kernels are there
                fault = _brief(error)
        if not world.any_rank(not installed or bool(fault)):
            return f"{remark}; torch's flash kernels are those of {name}"
        if torch_attention.current_flash_attention_impl() is not None:
            torch_attention.restore_flash_attention_impl()
        if installed:
            remark += f"; {name} is installed and not used: {fault or 'not on every rank'}"
    return remark


def choose_precision(
    device: torch.device,
    dtype: str = "auto",
    backend: str = "auto",
    fp8: bool = False,
    world: World | None = None,
    fp8_head: bool = False,
) -> tuple[Precision, str]:
    """How a model computes on a device, and a line that says why.

    Args:
        device: where the model runs.
        dtype: the value of --dtype.
        backend: the value of --attention.
        fp8: the value of --fp8.
        world: the ranks that take the same backend.
        fp8_head: the value of --fp8-head.

    Raises:
        UserError: one of them is unknown, or not available here.
    """
    compute_dtype, dtype_reason = choose_dtype(device, dtype)
    if fp8:
        require_fp8(device, compute_dtype)
        wide = "wide linear layers and the head" if fp8_head else "wide linear layers"
        dtype_reason += f", {wide} in fp8 while training"
    name, reason = choose_backend(device, backend, compute_dtype, world)
    line = f"computing in {compute_dtype} ({dtype_reason}), attention by {name} ({reason})"
    return Precision(compute_dtype, name, fp8, fp8_head), line


def window_hint(config: GPTConfig, backend: str, device: torch.device) -> str:
    """A line for the plan where short attention windows take longer than full attention would, or "".

    A window always saves multiplications, and time where the kernel knows of windows. Masked chunks of twice
    the window lose more to the mask than they save, and of blocks of 128 two are half empty at any window.

    Args:
        config: the model; its windows are those that a run ends with.
        backend: the attention backend of its training pass.
        device: where the model runs; on a CPU the chunks follow the window closely.
    """
    length, windows, documents = config.sequence_len, config.windows, config.document_mask
    if device.type != "cuda" or backend in PACKED or min(windows) >= length - 1:
        return ""
    planned = sum(_keys(window, length, backend, documents) for window in windows) / len(windows)
    full, kernel = min((_keys(length, length, name, documents), name) for name in (backend, "sdpa"))
    if planned <= full:
        return ""
    choice = "" if kernel == backend else f" --attention {kernel}"
    return (
        f"hint: by {backend}, attention in the windows {config.window_pattern} takes about "
        f"{planned / full:.1f} times as long as full attention at T={length:,} (an estimate): "
        f"--window-pattern L{choice} sees more in less time"
    )


def _keys(window: int, length: int, backend: str, documents: bool) -> float:
    """Time of a layer's attention: keys a query that the dense causal flash kernel would see in it."""
    if backend == "flex":
        return min(window + FLEX_BLOCK, (length + FLEX_BLOCK) / 2) / FLEX_RATE
    if window < length - 1:
        return min(window + max(window, MIN_STACKED_CHUNK), length) / MASKED_RATE
    return length / MASKED_RATE if documents else length / 2
