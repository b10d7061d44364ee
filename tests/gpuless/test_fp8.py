"""The kernel that writes fp8 by rows and by columns, without a GPU."""

from __future__ import annotations

import os

import pytest

from tests.gpuless import pretended

pytestmark = pytest.mark.skipif(bool(pretended.missing()), reason=pretended.missing())


def test_rows_and_columns_hold_the_numbers_of_the_matrix() -> None:
    answer = pretended.probe({**os.environ, "TRITON_INTERPRET": "1"}, "fp8_probes.interpreted")
    assert all(answer)
    assert len(answer) == 18


def test_a_tile_turns_in_shared_memory_with_wide_loads_and_stores() -> None:
    for used in pretended.probe(dict(os.environ), "fp8_probes.compiled"):
        assert used["spills"] == 0
        assert used["registers"] <= 128  # two programs of 8 warps a multiprocessor, or more
        assert 0 < used["shared"] <= 72 * 1024
        assert used["wide_loads"] > 0
        assert used["wide_stores"] > 0
