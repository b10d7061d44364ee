"""The MLP's fused kernels: right in Triton's interpreter, and compiled for Hopper as they are meant to be."""

from __future__ import annotations

import os
from typing import Any

import pytest

from tests.gpuless import pretended

pytestmark = pytest.mark.skipif(bool(pretended.missing()), reason=pretended.missing())
INTERPRETED = {**os.environ, "TRITON_INTERPRET": "1"}
FP8_ERROR = 0.2
SHARED_BYTES = 227 * 1024  # that a program may have on Hopper


@pytest.fixture(scope="module")
def interpreted() -> dict[str, list[float]]:
    return pretended.probe(INTERPRETED, "mlp_probes.interpreted")


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    return pretended.probe(dict(os.environ), "mlp_probes.compiled")


@pytest.mark.parametrize(("dtype", "most"), [("fp32", 1e-6), ("fp16", 1e-3)])
def test_the_fused_mlp_and_its_gradients_are_those_of_the_formula(
    interpreted: dict[str, list[float]], dtype: str, most: float
) -> None:
    assert len(interpreted[dtype]) == 4
    assert max(interpreted[dtype]) < most


def test_rows_and_columns_are_the_same_numbers(interpreted: dict[str, list[float]]) -> None:
    assert max(interpreted["layouts"]) < 1e-3


def test_in_fp8_the_scales_lead_to_the_same_place(interpreted: dict[str, list[float]]) -> None:
    """The interpreter's conversion to fp8 is worse than the device's: it loses carries and small numbers."""
    assert max(interpreted["fp8"]) < FP8_ERROR


def test_in_fp8_rows_without_a_gradient_do_not_end_the_others(interpreted: dict[str, list[float]]) -> None:
    """Of 16 rows one has a gradient, none of those that lie at the distances of a sample."""
    assert max(interpreted["fp8 of few rows"]) < FP8_ERROR


def test_what_is_not_a_number_stays_so(interpreted: dict[str, list[float]]) -> None:
    assert interpreted["nan"] == [True, True]


@pytest.mark.parametrize(
    ("name", "product"),
    [
        ("up", ["m64n256k16", "bf16", "bf16"]),
        ("down", ["m64n256k16", "bf16", "bf16"]),
        ("up_fp8", ["m64n256k32", "e4m3", "e4m3"]),
        ("down_fp8", ["m64n128k32", "e5m2", "e4m3"]),
    ],
)
def test_a_kernel_feeds_the_matrix_units_and_spills_nothing(
    compiled: dict[str, dict[str, Any]], name: str, product: list[str]
) -> None:
    used = compiled[name]
    assert used["products"] == [product]
    assert used["spills"] == 0
    assert used["shared"] <= SHARED_BYTES
    assert used["bulk_copies"] > 4
