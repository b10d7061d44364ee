"""CUDA without a GPU: shapes, layouts, copies, memory and graphs of a training step for an H100.

Nothing is computed: what a kernel gives, how fast it is, and what NCCL does are not tested here.
"""

from __future__ import annotations

from typing import Any

import pytest

from nanochat.config.recipes import RECIPES
from nanochat.model.attention import BACKENDS
from tests.gpuless import pretended

pytestmark = pytest.mark.skipif(bool(pretended.missing()), reason=pretended.missing())


SMALL: list[dict[str, Any]] = [
    {"depth": 4},
    {"depth": 4, "fp8": True},
    {"depth": 4, "recompute": "block", "bigram": True},
]


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param(SMALL, id="d4"),
        pytest.param([{"depth": 12, "fp8": True}], id="d12", marks=pytest.mark.slow),
        pytest.param([{"depth": 24}, {"depth": 24, "fp8": True}], id="d24", marks=pytest.mark.slow),
    ],
)
def test_a_step_of_eight_ranks_meets_every_rule_and_never_waits(
    gpu: dict[str, str], asked: list[dict[str, Any]]
) -> None:
    for arguments, answer in zip(asked, pretended.probe(gpu, "probes.steps", asked=asked), strict=True):
        assert answer["crossings"] == {}, arguments
        # At depth 4 a chunk of the loss is a third of all, and the estimate has room for more.
        least, most = (0.6, 1.05) if arguments["depth"] == 4 else (0.8, 1.0)
        assert least < answer["peak_gb"] / answer["estimate_gb"] < most, arguments
        assert answer["estimate_gb"] < 75, arguments  # which fits a card of 80 GB


def test_the_forward_pass_is_one_graph_under_every_pair_of_choices(gpu: dict[str, str]) -> None:
    answer = pretended.probe(gpu, "graph_probes.passes", pairs_only=True)
    assert answer["wrong"] == []
    assert answer["combinations"] >= 12
    assert set(answer["backends"]) >= set(BACKENDS) - {"fa2"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_forward_pass_is_one_graph_under_every_choice(gpu: dict[str, str], backend: str) -> None:
    answer = pretended.probe(gpu, "graph_probes.passes", 1700, pairs_only=False, backends=[backend])
    assert answer["wrong"] == []
    assert answer["combinations"] == 72 * len(answer["backends"])


def bounds(stages: int) -> dict[str, int]:
    """The graphs that a run may make: one a stage and way of using it, and one a shape of matrices."""
    return {"before": stages - 1, "step": 1 + 4, "second": 0, "validation": stages, "again": 0, **SCORING}


SCORING = {"core": 0, "decoding": 0}  # shapes come as they are, so nothing may be compiled for one


def test_a_race_compiles_each_stage_once_and_scores_uncompiled(gpu: dict[str, str]) -> None:
    answer = pretended.probe(gpu, "graph_probes.recipes", backend="fa3", names=["speedrun-124m"])
    assert answer == {"speedrun-124m": bounds(stages=3)}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["fa3", "sdpa"])
def test_a_run_of_any_recipe_compiles_each_stage_once(gpu: dict[str, str], backend: str) -> None:
    stages = {name: max(1, len(recipe.window_stages)) for name, recipe in RECIPES.items()}
    answer = pretended.probe(gpu, "graph_probes.recipes", backend=backend)
    assert answer == {name: bounds(count) for name, count in stages.items()}


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
