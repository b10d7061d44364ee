"""Bytes moved, kernels launched, and cubins assembled, by a training step compiled for a pretended H100."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tests.gpuless import pretended, ratchet

pytestmark = pytest.mark.skipif(bool(pretended.missing()), reason=pretended.missing())
REMEDY = "moves or launches more than dev/bench/bytes.json has; if it must, renew the file: " + (
    "python -m tests.gpuless.ratchet --write"
)


@pytest.mark.timeout(2000)
@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["d2-fp8", "d4"], id="small"),
        pytest.param(["d4-fp8"], id="d4-fp8", marks=pytest.mark.slow),
        pytest.param(["d24"], id="d24", marks=pytest.mark.slow),
        pytest.param(["d24-fp8"], id="d24-fp8", marks=pytest.mark.slow),
    ],
)
def test_a_step_moves_no_more_bytes_in_no_more_kernels(gpu: dict[str, str], names: list[str]) -> None:
    if ratchet.version() != ratchet.written()["torch"]:
        pytest.skip(f"the figures are of torch {ratchet.written()['torch']}, whose compiler is another one")
    found = ratchet.complaints(gpu, *names)
    assert not found, f"{REMEDY} {' '.join(names)}: {found}"


def test_a_figure_that_has_grown_by_a_fiftieth_is_told() -> None:
    before: dict[str, Any] = ratchet.written()["steps"]["d4"]
    now = copy.deepcopy(before)
    assert ratchet.grown(before, now) == []
    now["batches"]["forward"]["fused"]["gb"] *= 1.02
    now["update"]["products"]["kernels"] += 1
    now["batches"]["loss"]["triton"] = {"kernels": 1, "gb": 0.5}
    assert [line.split(":")[0] for line in ratchet.grown(before, now)] == [
        "batches forward fused",
        "batches loss triton",
        "batches loss triton",
        "update products",
    ]


@pytest.mark.slow
@pytest.mark.timeout(2000)
@pytest.mark.parametrize(
    "flags", [{"depth": 4}, {"depth": 4, "fp8": True}, {"depth": 24, "fp8": True}], ids=str
)
def test_every_triton_kernel_is_assembled_and_has_a_configuration_without_spills(
    gpu: dict[str, str], flags: dict[str, Any]
) -> None:
    answer = pretended.probe(gpu, "bytes_probes.cubins", 1900, **flags)
    assert answer["kernels"] > 50
    assert answer["spilling"] == {}
    assert answer["registers"] <= 255
    assert answer["shared"] <= 227 << 10  # of a block on sm_90
