"""The bench of links: rates in words, and the slow one by name; measured for real in tests/dist."""

from __future__ import annotations

from dev.bench.links import Link, describe, report
from nanochat.distributed.world import World


def test_alone_there_is_no_link() -> None:
    assert report(World.single_process()) == []


def test_a_slow_link_is_named_among_its_kind() -> None:
    within = [Link(0, 1, False, 9e9), Link(1, 2, False, 10e9), Link(2, 3, False, 11e9)]
    across = [Link(3, 4, True, 1e9), Link(4, 5, True, 1.1e9), Link(5, 0, True, 0.2e9)]
    assert describe(within + across) == [
        "links within a machine: 10.00 GB/s (median of 3)",
        "links between machines: 1.00 GB/s (median of 3)",
        "warning: the link from rank 5 to rank 0 is slow: 0.20 GB/s",
    ]
