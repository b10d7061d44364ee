"""Attention on a pretended GPU: which backend is chosen, one graph for each, nothing compiled for scoring."""

from __future__ import annotations

from typing import Any

import pytest

from tests.gpuless import pretended

pytestmark = pytest.mark.skipif(bool(pretended.missing()), reason=pretended.missing())

FASTEST = "the fastest for this GPU"
# Packages, compute capability, --attention -> backend, and what the reason begins with.
CHOICES: list[tuple[list[str], int, str, str, str]] = [
    ([], 9, "auto", "varlen", "fa3: neither flash_attn_interface nor kernels (the extra gpu) is installed"),
    (["flash"], 9, "auto", "fa3", FASTEST),
    (["hub"], 9, "auto", "fa3", f"{FASTEST}; from the hub, kernels-community/flash-attn3 version 1"),
    (
        ["broken"],
        9,
        "auto",
        "varlen",
        "fa3: does not run here: ImportError: flash_attn_3/_C.abi3.so: undefined",
    ),
    (["offline"], 9, "auto", "varlen", "fa3: does not run here: ValueError: Kernel repository"),
    (["flash"], 9, "varlen", "varlen", "as asked; FA3 is installed and not used: RuntimeError"),
    (["flash"], 8, "auto", "fa2", FASTEST),
    ([], 8, "auto", "varlen", "fa2: the module flash_attn.flash_attn_interface is not installed"),
    (["fa4"], 8, "auto", "varlen", "fa2: the module flash_attn.flash_attn_interface is not installed"),
    (["fa4"], 9, "auto", "varlen", "fa3: neither"),
    (["fa4"], 10, "auto", "varlen", f"{FASTEST}; torch's flash kernels are those of FA4"),
    (["flash", "hub"], 12, "auto", "varlen", FASTEST),
    ([], 7, "auto", "flex", f"{FASTEST}; where a pass is not compiled, sdpa"),
]


def test_the_order_is_that_of_the_architecture_and_a_package_is_tried_before_it_is_taken(
    gpu: dict[str, str],
) -> None:
    cases = [choice[:3] for choice in CHOICES]
    found = pretended.probe(gpu, "attention_probes.chosen", cases=cases)
    for (*_, backend, reason), (chosen, why) in zip(CHOICES, found, strict=True):
        assert chosen == backend, why
        assert why.startswith(reason)


@pytest.mark.parametrize(
    ("backends", "kinds", "packages"),
    [
        (["varlen"], ["softmax", "diff1"], []),
        (["fa3"], ["softmax"], ["hub"]),
        pytest.param(["varlen", "flex", "sdpa"], ["softmax", "diff1", "diff2"], [], marks=pytest.mark.slow),
        pytest.param(["fa3", "fa2"], ["softmax", "diff1", "diff2"], ["flash"], marks=pytest.mark.slow),
        pytest.param(["fa3"], ["diff1", "diff2"], ["hub"], marks=pytest.mark.slow),
    ],
)
def test_the_pass_is_one_graph_by_every_backend_with_windows_and_documents(
    gpu: dict[str, str], backends: list[str], kinds: list[str], packages: list[str]
) -> None:
    arguments: dict[str, Any] = {"backends": backends, "kinds": kinds, "packages": packages}
    answer = pretended.probe(gpu, "attention_probes.graphs", **arguments)
    assert len(answer) == 2 * len(backends) * len(kinds)
    assert set(map(tuple, answer.values())) == {(1, 0)}, answer


@pytest.mark.slow
def test_the_starts_of_rows_are_made_once_for_all_layers_and_documents_never_go_to_cudnn(
    gpu: dict[str, str],
) -> None:
    """Before 9.25 cuDNN made NaN of empty sequences, and slots without a document are such."""
    rows = pretended.probe(gpu, "attention_probes.varlen_calls", documents=False)
    assert rows == {"arange": 1, "flash": 3}  # of four layers one is seen whole, by the dense kernel
    documents = pretended.probe(gpu, "attention_probes.varlen_calls", documents=True)
    assert documents["flash"] == 4
    assert "other" not in documents


@pytest.mark.parametrize("documents", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_scoring_and_decoding_of_forty_shapes_compile_nothing(gpu: dict[str, str], documents: bool) -> None:
    answer = pretended.probe(gpu, "attention_probes.scoring", backend="flex", documents=documents)
    assert answer == {"shapes": 40, "frames": 0}


@pytest.mark.parametrize(
    ("backend", "packages", "calls"),
    [("fa3", ["flash"], 12), pytest.param("fa2", ["flash"], 12, marks=pytest.mark.slow), ("flex", [], 0)],
)
def test_steps_of_rows_of_different_lengths_take_the_kernel_for_them_and_compile_nothing(
    gpu: dict[str, str], backend: str, packages: list[str], calls: int
) -> None:
    answer = pretended.probe(gpu, "attention_probes.serving", backend=backend, packages=packages)
    assert answer == {"frames": 0, "calls": calls}
