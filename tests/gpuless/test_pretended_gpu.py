"""CUDA without a GPU: shapes, layouts, copies, memory and graphs of a training step for an H100.

Nothing is computed: what a kernel gives, how fast it is, and what NCCL does are not tested here.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.gpuless import pretended

pytestmark = pytest.mark.skipif(bool(pretended.missing()), reason=pretended.missing())


@pytest.mark.parametrize(
    ("depth", "flags"),
    [
        (4, {}),
        (4, {"fp8": True}),
        (4, {"recompute": "block", "bigram": True}),
        pytest.param(12, {"fp8": True}, marks=pytest.mark.slow),
        pytest.param(24, {}, marks=pytest.mark.slow),
        pytest.param(24, {"fp8": True}, marks=pytest.mark.slow),
    ],
)
def test_a_step_of_eight_ranks_meets_every_rule_and_never_waits(
    gpu: dict[str, str], depth: int, flags: dict[str, Any]
) -> None:
    answer = pretended.probe(gpu, "probes.step", depth=depth, **flags)
    assert answer["crossings"] == {}
    # At depth 4 a chunk of the loss, with its fp32 tile, is a third of all.
    least, most = (0.7, 1.05) if depth == 4 else (0.8, 1.0)
    assert least < answer["peak_gb"] / answer["estimate_gb"] < most
    assert answer["estimate_gb"] < 75  # which fits a card of 80 GB


PLAIN: dict[str, Any] = {}
DOCUMENTS, PAIRS = {"document_mask": True}, {"bigram": True, "attention_kind": "diff2"}


@pytest.mark.parametrize(
    ("backend", "flags"),
    [(backend, flags) for backend in ("fa3", "flex", "sdpa") for flags in (PLAIN, DOCUMENTS, PAIRS)],
)
def test_the_forward_pass_is_one_graph(gpu: dict[str, str], backend: str, flags: dict[str, Any]) -> None:
    answer = pretended.probe(gpu, "probes.graphs", backend=backend, **flags)
    assert answer == {"graphs": 2, "counts": [2], "breaks": {}}  # with gradients, and without


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_windows_that_grow_in_three_stages_make_six_graphs(gpu: dict[str, str], backend: str) -> None:
    answer = pretended.probe(
        gpu, "probes.graphs", backend=backend, windows=3, recipe="speedrun-124m", total_batch_size=393_216
    )
    assert answer == {"graphs": 6, "counts": [2, 4, 6], "breaks": {}}


@pytest.mark.slow
def test_memory_that_runs_out_leaves_the_passes_compiled(gpu: dict[str, str]) -> None:
    flags = {"recipe": "speedrun-124m", "total_batch_size": 393_216}
    answer = pretended.probe(gpu, "probes.graphs", backend="sdpa", windows=3, halvings=1, **flags)
    assert answer["graphs"] == 12
