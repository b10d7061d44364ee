"""Evaluation on a pretended H100: it waits once for many batches, and leaves the compiler alone."""

from __future__ import annotations

from typing import Any

import pytest

from tests.gpuless import pretended

pytestmark = pytest.mark.skipif(bool(pretended.missing()), reason=pretended.missing())


def test_evaluation_waits_for_the_device_once_and_copies_once_a_batch(gpu: dict[str, str]) -> None:
    found = pretended.probe(gpu, "eval_probes.crossings")
    batches = found["CORE"]["batches"]
    assert batches > 5
    assert found["CORE"] == {"batches": batches, "to device": batches, "to host": 1}
    assert found["validation"] == {"to device": 1, "to host": 4}  # bytes of the tokens; four sums at the end
    assert found["profile"] == {"to device": 1, "to host": 3}  # of three batches
    assert found["rows"] == {"to device": 1}
    assert found["decoding"] == {"to device": 1, "to host": 5}  # draws; five tokens


DOCUMENTS: dict[str, Any] = {"backend": "fa3", "document_mask": True}


@pytest.mark.parametrize(
    "flags", [{"backend": "sdpa"}, pytest.param(DOCUMENTS, marks=pytest.mark.slow)], ids=["sdpa", "fa3"]
)
def test_validation_core_and_decoding_compile_nothing(gpu: dict[str, str], flags: dict[str, Any]) -> None:
    """Validation in training takes the shape of the micro-batches; nothing else is compiled, at any shape."""
    graphs = pretended.probe(gpu, "eval_probes.compiled", **flags)
    assert graphs.pop("training") == 1
    assert graphs.pop("first validation") == 1  # the same pass without gradients
    assert set(graphs.values()) == {0}, graphs
