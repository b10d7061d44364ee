"""The Triton kernel that writes fp8 by rows and by columns: in the interpreter, and as cubins."""

from __future__ import annotations

from typing import Any

import torch

from nanochat.model import fp8_kernels as kernels
from tests.gpuless.mlp_probes import NAMES
from tests.gpuless.sass import compile_for

SHAPES = ((128, 128), (144, 208), (16, 400))


def interpreted() -> list[bool]:
    """Whether rows and columns are right, for numbers that fp8 has: the interpreter rounds wrongly."""
    right = []
    generator = torch.Generator().manual_seed(0)
    for shape in SHAPES:
        for dtype, wide in ((torch.float8_e4m3fn, torch.bfloat16), (torch.float8_e5m2, torch.float32)):
            codes = torch.randint(256, shape, generator=generator, dtype=torch.uint8).view(dtype).float()
            normal = torch.finfo(dtype).smallest_normal
            x8 = torch.where((codes.abs() >= normal) & codes.isfinite(), codes, 0.0)
            x8[0, 0], x8[1, 0] = 4 * torch.finfo(dtype).max, -4 * torch.finfo(dtype).max
            want = x8.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
            rows, columns = kernels.turn((x8 / 4).to(wide), torch.tensor(0.25), dtype)
            again = kernels.turn(rows, None, dtype)[1]
            right.append(torch.equal(rows.float(), want))
            right += [torch.equal(t.float().t(), want) for t in (columns, again)]
    return right


def compiled() -> list[dict[str, Any]]:
    """What the kernel uses where it quantizes a gradient, a weight, and where it only turns bytes."""
    found = []
    for source, result in (
        (torch.bfloat16, torch.float8_e5m2),
        (torch.float32, torch.float8_e4m3fn),
        (torch.uint8, torch.uint8),
    ):
        types = {"x": f"*{NAMES[source]}*", "columns": f"*{NAMES[result]}*", "count": "i32*", "width": "i32*"}
        if source != torch.uint8:
            types |= {"scale": "*fp32*", "rows": f"*{NAMES[result]}*"}
        constants = {"LARGEST": 448.0, "BLOCK": kernels.BLOCK}
        made = compile_for(kernels.turn_kernel, types, constants, kernels.WARPS)
        found.append(
            {
                "registers": made.registers,
                "spills": made.spills,
                "shared": made.shared,
                "wide_loads": made.count("LDG 128"),
                "wide_stores": made.count("STG 128"),
            }
        )
    return found
