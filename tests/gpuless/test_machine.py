"""The machine as a command sees it that has a GPU: the device, and the allocator behind it."""

from __future__ import annotations

import pytest

from tests.gpuless import pretended

pytestmark = pytest.mark.skipif(bool(pretended.missing()), reason=pretended.missing())


@pytest.mark.parametrize(
    ("given", "grows"),
    [({}, True), ({"PYTORCH_ALLOC_CONF": "expandable_segments:False"}, False)],
)
def test_segments_grow_unless_the_user_has_said_otherwise(
    gpu: dict[str, str], given: dict[str, str], grows: bool
) -> None:
    environment = {name: value for name, value in gpu.items() if not name.endswith("_ALLOC_CONF")}
    answer = pretended.probe(environment | given, "machine_probes.allocator")
    assert answer == {"device": "cuda:0", "grows": grows}
