"""Fixtures shared by the tests."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from nanochat.common import machine
from tests.reliability.figures import Figure, close

REPO = Path(__file__).resolve().parents[1]
OUTCOME = pytest.StashKey[str]()
SHARED_DATA = REPO.parent / "shared" / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config: pytest.Config) -> None:
    """One thread a process, children included: on a busy machine threads wait for each other for minutes."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    if not torch.cuda.is_available():  # a GPU that torch cannot use would end every command
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


def pytest_sessionfinish() -> None:
    """Let the collector see at the end what it was kept from: see `quick_start`."""
    gc.unfreeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="slow: run with --slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def base_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a base directory of its own; none touches the user's."""
    folder = tmp_path / "base"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folder))
    return folder


@pytest.fixture(autouse=True)
def quick_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run in this process takes no second before its first step.

    The machine is measured by a small product, not for 0.8 s by a large one; and what pytest holds, once put
    aside from the garbage collector, is not looked through again by every run.
    """
    measured = machine.measured_flops_per_s
    monkeypatch.setattr(
        machine, "measured_flops_per_s", lambda device, dtype, size=0: measured(device, dtype, 128, 0.0)
    )
    monkeypatch.setattr(gc, "unfreeze", lambda: None)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data beside the checkout; users do not have it."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the real data are not beside this checkout")
    return SHARED_DATA


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Keep how the body of the test ended, for the fixture `figure`."""
    report = yield
    if report.when == "call":
        item.stash[OUTCOME] = report.outcome
    return report


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Iterator[Callable[..., Figure]]:
    """`figure("P5", "bits flipped")` -> a Figure whose trials are recorded when the test ends."""
    made: list[Figure] = []

    def make(promise: str, unit: str, *, independent: bool = True) -> Figure:
        made.append(Figure(promise, unit, independent))
        return made[-1]

    yield make
    close(made, request.node.stash.get(OUTCOME, "failed"))
