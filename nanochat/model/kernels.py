"""Devices that the Triton kernels of this folder are compiled for."""

from __future__ import annotations

import functools
import importlib.util

import torch


@functools.cache
def run_on(device: torch.device) -> bool:
    """Whether Triton is installed and compiles for the device: a GPU of compute capability 7.0 or later."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (7, 0)
