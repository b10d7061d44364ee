"""The MLP's Triton kernels: what the interpreter computes with them, and what the compiler makes of them."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from nanochat.model import fp8, mlp
from nanochat.model import mlp_kernels as kernels
from nanochat.model.fp8 import quantize_weight
from tests.gpuless.sass import compile_for

N, C, H = 256, 128, 512
NAMES = {
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
    torch.uint8: "u8",
    torch.float32: "fp32",
}


def factors(dtype: torch.dtype) -> list[Tensor]:
    """Normed x (N, C), both weights, and a gradient (N, C)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, C, generator=generator)
    x /= x.square().mean(1, keepdim=True).sqrt()
    up, down = (torch.randn(*shape, generator=generator) / shape[1] ** 0.5 for shape in ((H, C), (C, H)))
    return [t.to(dtype) for t in (x, up, down, torch.randn(N, C, generator=generator) * 1e-3)]


def exact(x: Tensor, up: Tensor, down: Tensor, grad: Tensor) -> list[Tensor]:
    """The MLP's output and its three gradients, in float64."""
    leaves = [t.double().requires_grad_() for t in (x, up, down)]
    out = (leaves[0] @ leaves[1].t()).relu().square() @ leaves[2].t()
    out.backward(grad.double())
    return [out.detach(), *(t.grad for t in leaves if t.grad is not None)]


def error(got: Tensor, want: Tensor) -> float:
    """Relative, of the whole tensor."""
    return float((got.double() - want).norm() / want.norm())


def fused(dtype: str) -> list[float]:
    """Errors of the output and of the gradients of x, up and down, in a dtype that the interpreter knows."""
    x, up, down, grad = factors(getattr(torch, dtype))
    leaves = [t.clone().requires_grad_() for t in (x, up, down)]
    out = mlp.FusedMLP.apply(*leaves)
    out.backward(grad)
    got = [out.detach(), *(t.grad for t in leaves)]
    return [error(a, b) for a, b in zip(got, exact(x, up, down, grad), strict=True)]


def fused_in_fp8(count: int = N, of: int = N) -> list[float]:
    """Likewise in fp8; the interpreter's conversion to fp8 loses a carry and small numbers.

    Scales are of `count` rows, and of each `of` rows of the gradient the last alone is not zero.
    """
    fp8.SAMPLED_ROWS = count
    x, up, down, grad = factors(torch.float32)
    grad *= (torch.arange(N) % of == of - 1)[:, None] if of < N else 1
    weights = [quantize_weight(t) for t in (up, down)]
    leaves = [t.bfloat16().requires_grad_() for t in (x, up, down)]
    out = mlp.FusedMLPInFp8.apply(*leaves, *weights[0], *weights[1])
    out.backward(grad.bfloat16())
    assert [t.grad.dtype for t in leaves if t.grad is not None] == [torch.bfloat16] * 3
    got = [out.detach(), *(t.grad for t in leaves)]
    return [error(a, b) for a, b in zip(got, exact(x, up, down, grad), strict=True)]


def both_layouts() -> list[float]:
    """Errors of the fp8 variants of both kernels, of rows and of columns, on fp16 in the place of fp8."""
    x, up, down, grad = factors(torch.float16)
    scales = torch.tensor([0.5, 4.0])
    rows, columns = kernels.up(x, up, scales)
    assert columns is not None
    want = (x.double() @ up.double().t() * 0.5).relu().square() * 4
    errors = [error(rows, want), error(columns.t(), want)]
    grad_rows, grad_columns = kernels.down_gradient(grad, down.t().contiguous(), columns, scales)
    assert grad_columns is not None
    want = grad.double() @ down.double() * columns.t().double().sqrt() * 2
    return [*errors, error(grad_rows, want), error(grad_columns.t(), want)]


def interpreted() -> dict[str, list[float]]:
    """All of the above, and `not_a_number`."""
    return {
        "fp32": fused("float32"),
        "fp16": fused("float16"),
        "fp8": fused_in_fp8(),
        "fp8 of few rows": fused_in_fp8(32, 16),
        "layouts": both_layouts(),
        "nan": not_a_number(),
    }


def not_a_number() -> list[bool]:
    """Whether a NaN comes out of both products, in its row alone."""
    x, up, down, grad = factors(torch.float32)
    x[3, 5] = grad[3, 5] = torch.nan
    post = kernels.up(x, up)[0]
    grad_z = kernels.down_gradient(grad, down, torch.ones_like(post))[0]
    return [bool(t[3].isnan().all() and not t[4].isnan().any()) for t in (post, grad_z)]


def compiled() -> dict[str, dict[str, Any]]:
    """What each kernel uses as a cubin."""
    return {name: compiled_one(name) for name in ("up", "up_fp8", "down", "down_fp8")}


def compiled_one(name: str) -> dict[str, Any]:
    """What a kernel in bf16 or fp8 uses as a cubin for sm_90; named as its tile is."""
    eight = name.endswith("fp8")
    tile = getattr(kernels, name.upper())
    first, second = (torch.float8_e4m3fn, torch.float8_e5m2) if eight else (torch.bfloat16,) * 2
    half = tile.n // 2
    if name.startswith("up"):
        descriptors = {
            "x": (first, tile.m, tile.k),
            "w": (first, tile.n, tile.k),
            "post": (first, tile.m, half),
            "columns": (first, half, tile.m),
        }
    else:
        descriptors = {
            "g": (second, tile.m, tile.k),
            "w": (first, tile.n, tile.k) if eight else (first, tile.k, tile.n),
            "post": (first, half, tile.m) if eight else (first, tile.m, half),
            "out": (second, tile.m, half),
            "columns": (second, half, tile.m),
        }
    types = {key: f"tensordesc<{NAMES[d]}[{a}, {b}]>" for key, (d, a, b) in descriptors.items()}
    if eight:
        types["scales"] = "*fp32*"
    else:
        del types["columns"]
    types |= dict.fromkeys(("rows", "hidden", "width"), "i32*")
    result = torch.empty(0, dtype=descriptors["post" if name.startswith("up") else "out"][0])
    constants = kernels._constants(result, torch.ones(2) if eight else None, tile, 132) | {
        "EXACT": tile.exact
    }
    kernel = kernels.up_kernel if name.startswith("up") else kernels.down_gradient_kernel
    warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
    made = compile_for(kernel, types, constants, warps, num_stages=stages)
    product = r"wgmma\.mma_async\.sync\.aligned\.(\w+)\.f32\.(\w+)\.(\w+)"
    return {
        "spills": made.spills,
        "shared": made.shared,
        "products": sorted(set(re.findall(product, made.ptx))),
        "bulk_copies": made.ptx.count("cp.async.bulk.tensor"),
    }
