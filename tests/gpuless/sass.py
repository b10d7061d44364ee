"""Triton kernels compiled for a GPU that is not there: registers, spills and widths of loads are seen."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

from tests.gpuless import pretended


@dataclass(frozen=True)
class Compiled:
    """What a kernel uses: registers a thread, bytes of local memory (spills) and of shared memory."""

    registers: int
    spills: int
    shared: int
    code: str
    ptx: str

    def count(self, instruction: str) -> int:
        """How often an instruction stands in the code; "LDG 128" is a load of 128 bits."""
        name, _, width = instruction.partition(" ")
        return len(re.findall(rf"\b{name}\b[.\w]*{width}\b", self.code))


def compile_for(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    warps: int,
    capability: int = 90,
    **options: Any,
) -> Compiled:
    """The kernel as a cubin for a compute capability.

    Args:
        kernel: made by triton.jit.
        types: of its arguments that are no constants. A number that a multiple of 16 is promised of has a
            star behind, as has a pointer that is aligned.
        constants: values of the others; those that are in none of both are None.
        warps: of a program.
        capability: 90 is Hopper.
        options: others of the compiler.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    given = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    attributes = {
        (place,): [["tt.divisibility", 16]] for place, kind in enumerate(given.values()) if kind[-1] == "*"
    }
    signature = {name: kind.removesuffix("*") for name, kind in given.items()}
    known = {name: constants.get(name) for name, kind in given.items() if kind == "constexpr"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=known, attrs=attributes)
    options |= {"num_warps": warps, "enable_fp_fusion": True}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    used = resources(made.asm["cubin"])
    code = _dump(made.asm["cubin"], "-sass")
    spills = used["STACK"] + used["LOCAL"]
    return Compiled(used["REG"], spills, made.metadata.shared, code, made.asm["ptx"])


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, and bytes of stack, local and shared memory: {"REG", "STACK", "LOCAL", "SHARED", ...}."""
    used = _dump(cubin, "-res-usage")
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", used)}


def _dump(cubin: bytes, option: str) -> str:
    tool = pretended.headers().parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True)
    return done.stdout
