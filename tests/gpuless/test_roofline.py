"""The bench of a GPU on a pretended one: shapes, dtypes and layouts of what it measures at full size."""

from __future__ import annotations

import pytest

from tests.gpuless import pretended

pytestmark = pytest.mark.skipif(bool(pretended.missing()), reason=pretended.missing())


def test_every_part_can_be_measured_at_full_size(gpu: dict[str, str]) -> None:
    answer = pretended.probe(gpu, "roofline_probes.figures")
    assert answer["fp8_rates"] == ["matmul_fp8_forward", "matmul_fp8_backward"]
    assert answer["loss_of_tokens"] == ["loss_time", "head_products_time"]
    assert answer["mlp"] == ["mlp_time", "mlp_products_time"]
    assert answer["attention_kernel"] == ["attention_time", "attention_time"]  # two windows
    assert answer["optimizer_update"] == ["optimizer_time"]
    assert "memory_rate" in answer["machine_rates"]
