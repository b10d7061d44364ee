"""Kernels of embedding tables: their numbers, by Triton's interpreter; what they move; how they compile."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nanochat.model.table_rows import lookup
from tests.gpuless import pretended

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="there is no triton")
needs_pretended = pytest.mark.skipif(bool(pretended.missing()), reason=pretended.missing())

KINDS = ("kind", "tokens", "rows", "width", "dtype")
FEW = [
    ("zipf", 60, 50_257, 40, "float32"),
    ("zipf", 100, 30, 40, "bfloat16"),
    ("same", 320, 30, 16, "float32"),  # ten pieces of one id: more than a program adds at a time
    ("runs", 0, 50, 40, "float16"),
    ("different", 20, 50, 300, "float16"),  # two blocks of columns
    ("different", 1, 50, 16, "float32"),
]
MANY = [
    ("zipf", 60, 50_257, 768, "bfloat16"),
    ("same", 300, 30, 100, "bfloat16"),
    ("different", 12, 1000, 1536, "float16"),
]


def check(settings: list[tuple[Any, ...]]) -> None:
    cases = [dict(zip(KINDS, setting, strict=True)) for setting in settings]
    interpreter = {**os.environ, "TRITON_INTERPRET": "1"}
    for case, found in zip(
        cases, pretended.probe(interpreter, "table_probes.numbers", cases=cases), strict=True
    ):
        # The interpreter cuts fp32 to bf16 where a GPU rounds.
        assert found["rows"] <= torch.finfo(getattr(torch, case["dtype"])).eps, case
        assert found["error"] < 1e-6, case
        assert found["twice"] < 2e-6, case
        assert found["again"], case
        assert found["ready"] == [True] * 4, case


def test_gradients_of_rows_add_up_as_in_float64_and_in_a_fixed_order() -> None:
    check(FEW)


@pytest.mark.slow
def test_gradients_of_many_rows_add_up_as_in_float64_and_in_a_fixed_order() -> None:
    check(MANY)


def test_on_a_cpu_a_lookup_is_torchs_own() -> None:
    table, ids = nn.Parameter(torch.randn(20, 8)), torch.randint(0, 20, (2, 5))
    rows = lookup(table, ids, None, torch.bfloat16)
    assert torch.equal(rows, F.embedding(ids, table).to(torch.bfloat16))
    (dense,) = torch.autograd.grad(rows.float().square().sum(), table)
    assert dense.shape == table.shape


@needs_pretended
def test_no_micro_batch_fills_or_adds_a_dense_gradient(gpu: dict[str, str]) -> None:
    sizes = {"tokens": 32_768, "vocabulary": 32_768, "width": 1536}
    kernels, dense = pretended.probe(gpu, "table_probes.both_gradients", **sizes)
    assert kernels["crossings"] == {}
    assert "aten.embedding_dense_backward" in dense["operations"]
    assert not {"aten.zeros_like", "aten.add_", "aten.embedding_dense_backward"} & set(kernels["operations"])
    assert kernels["operations"]["aten.sort"] == 1  # for all tables
    assert kernels["megabytes"] < 500
    assert dense["megabytes"] > 1500


def compiled(capability: int, dtype: str) -> dict[str, Any]:
    from nanochat.model import table_kernel as kernel
    from tests.gpuless.sass import compile_for

    half = {"bfloat16": "*bf16*", "float16": "*fp16*", "float32": "*fp32*"}[dtype]
    sizes = {"count": "i32*", "width": "i32*"}
    blocks = {"ROWS": kernel.ROWS, "COLUMNS": kernel.COLUMNS, "PIECE": kernel.PIECE}
    sums = {"total": "*fp32*", "partial": "*fp32*"}
    gathered = {"TOKENS": kernel.GATHERED_TOKENS, "COLUMNS": kernel.GATHERED_COLUMNS}
    gather = {"table": "*fp32*", "ids": "*i64*", "out": half, **sizes}
    add = {**sums, "grad": half, "ids": "*i32*", "tokens": "*i64*", "starts": "*i64*", **sizes}
    partial = {**sums, "ids": "*i32*", **sizes}
    return {
        "gather": compile_for(kernel.gather, gather, gathered, 4, capability),
        "add": compile_for(kernel.add_pieces, add, blocks, 1, capability),
        "partial": compile_for(kernel.add_partial, partial, blocks, 1, capability),
    }


@needs_pretended
@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        (90, "bfloat16"),
        *(pytest.param(90, dtype, marks=pytest.mark.slow) for dtype in ("float16", "float32")),
        *(pytest.param(capability, "bfloat16", marks=pytest.mark.slow) for capability in (80, 100, 120)),
    ],
)
def test_the_kernels_compile_to_wide_loads_and_no_atomic_addition(capability: int, dtype: str) -> None:
    made = compiled(capability, dtype)
    wide = 1 if dtype != "float32" else 2
    for kernel in made.values():
        assert kernel.spills == 0
        assert kernel.count("ATOM") + kernel.count("ATOMG") + kernel.count("RED") == 0
    assert made["gather"].registers <= 40
    assert made["gather"].count("LDG 128") >= 4
    assert made["gather"].count("STG 128") == 2 * wide
    assert made["add"].registers <= 96  # twenty programs of a warp on a multiprocessor
    assert made["add"].count("LDG 128") == 8 * wide + 2  # eight rows, and the sum so far
    assert made["add"].count("STG 128") == 4  # to the total, or to the partial sums
    assert made["partial"].count("LDG 128") == 8 * 2 + 2
