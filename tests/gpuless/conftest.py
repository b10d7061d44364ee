"""The pretended GPU, built once for the tests of this folder."""

from __future__ import annotations

import pytest

from tests.gpuless import pretended


@pytest.fixture(scope="session")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that has an H100."""
    return pretended.build(tmp_path_factory.mktemp("pretended"))
