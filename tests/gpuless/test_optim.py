"""The optimizer on a pretended GPU: what it sends, and what SOAP multiplies in."""

from __future__ import annotations

import pytest

from tests.gpuless import pretended

pytestmark = pytest.mark.skipif(bool(pretended.missing()), reason=pretended.missing())


@pytest.mark.parametrize("depth", [4, pytest.param(24, marks=pytest.mark.slow)])
def test_gradients_in_bf16_are_half_the_bytes(gpu: dict[str, str], depth: int) -> None:
    answer = pretended.probe(gpu, "optim_probes.wire", depth=depth)
    wide, narrow = answer["float32"], answer["bfloat16"]
    assert 2 * narrow["all_to_all_single torch.bfloat16"] == wide["reduce_scatter_tensor torch.float32"]
    gathered = "all_gather_into_tensor torch.float32"
    assert narrow[gathered] == wide[gathered] == wide["reduce_scatter_tensor torch.float32"]
    small = "all_reduce torch.float32"
    assert narrow[small] == wide[small] < 0.001 * wide[gathered]


def test_soap_multiplies_in_tf32_and_nothing_else_does(gpu: dict[str, str]) -> None:
    answer = pretended.probe(gpu, "optim_probes.soap")
    found = answer["precision"]
    outside = found["after"][0]
    assert outside != "tf32"
    assert found["update"] == ["tf32"] * 4 + [outside] * 2  # on CUDA, compiled too; on a CPU
    assert set(found["find_basis"] + found["renew_basis"] + found["after"]) == {outside}
    assert answer["graphs"] == 1
