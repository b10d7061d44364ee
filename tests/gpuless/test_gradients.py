"""The kernel that adds gradients: its numbers in the interpreter, its code for Hopper."""

from __future__ import annotations

import os

import pytest

from tests.gpuless import pretended, sass

pytestmark = pytest.mark.skipif(bool(pretended.missing()), reason=pretended.missing())


def test_it_adds_one_or_two_gradients_to_a_total_in_their_order() -> None:
    found = pretended.probe({**os.environ, "TRITON_INTERPRET": "1"}, "gradient_probes.differences")
    assert found == dict.fromkeys(("torch.bfloat16", "torch.float16", "torch.float32"), 0.0)


def test_on_hopper_it_reads_128_bits_at_a_time_and_keeps_all_in_registers() -> None:
    from nanochat.model import gradient_kernel

    pointers = {"total": "*fp32*", "first": "*bf16*", "second": "*bf16*"}
    flags = {"FRESH": False, "PAIR": True, "BLOCK": gradient_kernel.BLOCK}
    types = {**pointers, "count": "i32*"}
    made = sass.compile_for(gradient_kernel.add, types, flags, gradient_kernel.WARPS)
    assert made.spills == 0
    assert made.registers <= 64
    assert made.count("LDG 128") >= 4  # 8 bf16 of either gradient, 2 x 4 fp32 of the total
    assert made.count("STG 128") >= 2
