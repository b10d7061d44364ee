"""The loss's kernel: what it computes, by Triton's interpreter; what it moves and how it is compiled."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest

from tests.gpuless import pretended

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="there is no triton")
needs_pretended = pytest.mark.skipif(bool(pretended.missing()), reason=pretended.missing())


def test_the_kernel_equals_the_operations() -> None:
    """Vocabularies that no block divides, ignored rows, extreme and equal logits, padding of NaN."""
    dtypes = ["float32", "bfloat16", "float16"]
    settings = [(100, 128, dtype, 8.0) for dtype in dtypes] + [(1000, 1000, dtype, 60.0) for dtype in dtypes]
    settings += [(50_257, 50_304, "bfloat16", 8.0), (32_768, 32_768, "float16", 8.0)]
    names = ("vocabulary", "padded", "dtype", "scale")
    cases = [dict(zip(names, setting, strict=True)) for setting in settings]
    interpreter = {**os.environ, "TRITON_INTERPRET": "1"}
    answer = pretended.probe(interpreter, "loss_probes.numbers", cases=cases, dtypes=dtypes)
    assert answer["fp8"]["loss"] < 0.005
    assert answer["fp8"]["weight"] < 0.05
    assert answer["fp8"]["weight weighted"] < 0.05
    assert answer["fp8"]["derivatives"] <= 0.13  # half a unit in the last place, and the rounding of bf16
    for case, found in zip(cases, answer["kernel"], strict=True):
        assert found["losses"] < 1e-5, case
        assert found["gradient"] < 1e-7, case  # beyond one unit in the last place; fp16 has denormal numbers
        assert found["weighted"] < 1e-7, case  # beyond two: what it is compared with was rounded before
        assert found["padding"] == 0, case
        assert found["hits"], case
    for dtype, found in zip(dtypes, answer["pass"], strict=True):
        rounding = 1e-6 if dtype == "float32" else 5e-3
        assert max(found.values()) < rounding, (dtype, found)
        assert found["hits"] == 0


@needs_pretended
def test_the_elementwise_part_moves_seven_bytes_a_logit(gpu: dict[str, str]) -> None:
    d24 = {"tokens": 32_768, "vocabulary": 32_768, "padded": 32_768, "width": 1536}
    race = {**d24, "vocabulary": 50_257, "padded": 50_304, "width": 768}
    cases: list[dict[str, Any]] = [d24, race, {**d24, "fp8": True}]
    cases += [{**d24, "grad": False}, {**d24, "kernel": False}, {**d24, "weighted": True}]
    train, other, fp8, evaluation, before, weighted = pretended.probe(
        gpu, "loss_probes.traffics", cases=cases
    )
    assert 6 <= train["a_logit"] < 7
    assert 6 <= other["a_logit"] < 7
    kernel = "nanochat.softcapped_losses"
    of_kernel = fp8["bytes"][kernel] / 32_768**2
    assert 7 <= of_kernel < 7.01  # a byte for the derivatives in e5m2; the rest quantises x and the head
    assert fp8["a_logit"] < 11.5
    assert fp8["products"] == {"aten.mm": 0, "aten.addmm": 4, "aten._scaled_mm": 8}
    assert evaluation["a_logit"] < 2.01  # the logits are read once, for the likeliest token too
    assert before["a_logit"] > 50
    assert train["kernels"] <= 40
    assert before["kernels"] > 400
    of_weights = (weighted["a_logit"] - train["a_logit"]) * 32_768  # bytes a token, of which x has 3,072
    assert weighted["bytes"][kernel] == train["bytes"][kernel] + 4 * 32_768
    assert 0 < of_weights < 40  # six passes over (N,) numbers, and none over (N, C) or (N, V)
    assert weighted["products"] == train["products"]
    assert weighted["crossings"] == train["crossings"] == {}  # nothing waits for the device
    # Three products a chunk; that of the weight adds to the fp32 gradient, and no other pass does.
    assert train["products"] == {"aten.mm": 8, "aten.addmm": 4, "aten._scaled_mm": 0}
    assert train["grads"] == ["torch.bfloat16", "torch.float32"]


POINTERS = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}


def compiled(dtype: str, with_hit: bool, capability: int, fp8: bool = False, weighted: bool = False) -> Any:
    from nanochat.model import loss_kernel
    from tests.gpuless.sass import compile_for

    types = {
        "z": f"{POINTERS[dtype]}*",
        "targets": "*i64*",
        "losses": "*fp32*",
        "row_stride": "i32*",
        "vocab": "i32",
        "columns": "i32*",
        **dict.fromkeys(("inner", "outer", "boost", "narrow_boost"), "fp32"),
    }
    types |= {"hits": "*i1*"} if with_hit else {}
    types |= {"narrow": "*fp8e5*"} if fp8 else {}
    types |= {"weights": "*fp32*"} if weighted else {}
    constants = {"WITH_GRAD": not with_hit, "BLOCK": loss_kernel.BLOCK}
    return compile_for(loss_kernel.row_losses, types, constants, loss_kernel.WARPS, capability)


@needs_pretended
@pytest.mark.parametrize(
    ("dtype", "with_hit", "capability"),
    [
        ("bfloat16", False, 90),
        pytest.param("bfloat16", True, 90, marks=pytest.mark.slow),
        pytest.param("float16", False, 90, marks=pytest.mark.slow),
        pytest.param("float32", False, 90, marks=pytest.mark.slow),
        pytest.param("bfloat16", False, 80, marks=pytest.mark.slow),
        pytest.param("bfloat16", False, 100, marks=pytest.mark.slow),
        pytest.param("bfloat16", False, 120, marks=pytest.mark.slow),
    ],
)
def test_the_kernel_compiles_to_wide_loads_and_few_registers(
    dtype: str, with_hit: bool, capability: int
) -> None:
    kernel = compiled(dtype, with_hit, capability)
    assert kernel.registers <= 64  # eight warps of 64 registers: four programs on a multiprocessor
    assert kernel.spills == 0
    # Sixteen logits a thread and pass, in loads of 128 bits; besides, the target and its logit.
    wide = 2 if dtype != "float32" else 4
    passes = 1 if with_hit else 2
    assert (kernel.count("LDG 128"), kernel.count("LDG")) == (wide * passes, wide * passes + 2)
    assert kernel.count("STG 128") == (0 if with_hit else wide)


@needs_pretended
def test_a_weight_of_a_row_is_one_load_more() -> None:
    kernel = compiled("bfloat16", False, 90, weighted=True)
    assert kernel.registers <= 64
    assert kernel.spills == 0
    assert (kernel.count("LDG 128"), kernel.count("LDG"), kernel.count("STG 128")) == (4, 4 + 3, 2)


@needs_pretended
def test_with_a_head_in_fp8_the_kernel_writes_a_byte_more() -> None:
    kernel = compiled("bfloat16", False, 90, fp8=True)
    assert kernel.registers <= 64
    assert kernel.spills == 0
    assert kernel.count("LDG 128") == 4
    assert kernel.count("STG 128") + kernel.count("STG 64") >= 3
