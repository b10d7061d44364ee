"""Two machines: network namespaces with a link between them, a torchrun in each, gloo over the link."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanochat.common import files
from tests.conftest import REPO
from tests.dist.launch import TRAIN, losses
from tests.tiny import command_line, tiny_corpus, train_tiny

pytestmark = pytest.mark.slow
FIRST, SECOND = "nanochat-a", "nanochat-b"


def ip(*words: str) -> int:
    return subprocess.run(["ip", *words], capture_output=True, check=False).returncode


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[None]:
    """Namespaces 10.77.0.1 and 10.77.0.2."""
    if sys.platform != "linux" or ip("netns", "add", FIRST):
        pytest.skip("network namespaces are not allowed here")
    try:
        assert ip("netns", "add", SECOND) == 0
        assert ip("link", "add", "va", "netns", FIRST, "type", "veth", "peer", "vb", "netns", SECOND) == 0
        for name, device, address in ((FIRST, "va", "10.77.0.1/24"), (SECOND, "vb", "10.77.0.2/24")):
            assert ip("-n", name, "addr", "add", address, "dev", device) == 0
            assert ip("-n", name, "link", "set", device, "up") == 0
            assert ip("-n", name, "link", "set", "lo", "up") == 0
        tiny_corpus(tmp_path)
        yield
    finally:
        ip("netns", "del", FIRST)
        ip("netns", "del", SECOND)


def start(machine: int, nodes: str, flags: list[str], program: tuple[str, ...] = TRAIN) -> subprocess.Popen[str]:
    """A torchrun of two ranks in one of the namespaces."""
    name, device = ((FIRST, "va"), (SECOND, "vb"))[machine]
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", "--nproc_per_node=2"]
    meet = ["--rdzv-backend=c10d", "--rdzv-endpoint=10.77.0.1:29477", "--rdzv-id=two", "--max-restarts=2"]
    # torchrun looks for the machine of the endpoint by its name, which both namespaces share.
    local = [f"--local-addr=10.77.0.{machine + 1}", f"--rdzv-conf=is_host={machine == 0}".lower()]
    return subprocess.Popen(
        ["ip", "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME={device}", *torchrun, *meet, *local, *program, *flags],
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_machines_train_the_run_of_one(machines: None) -> None:
    train_tiny(run="one", device_batch_size=2)
    both = [start(machine, "2", command_line(run="two", num_iterations=12, device_batch_size=2)) for machine in (0, 1)]
    try:
        told = [process.communicate(timeout=200) for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], told[0][1][-2000:] + told[1][1][-2000:]
    gaps = [abs(a - b) for a, b in zip(losses("one"), losses("two"), strict=True)]
    assert max(gaps) < 1e-5
    assert files.read_json(files.run_dir("two") / "summary.json")["world_size"] == 4


def test_the_bench_measures_the_link_between_two_machines(machines: None) -> None:
    both = [start(machine, "2", [], ("-m", "dev.bench.links")) for machine in (0, 1)]
    try:
        told = [process.communicate(timeout=100) for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], told[0][1][-2000:] + told[1][1][-2000:]
    said = told[0][0] + told[1][0]
    assert re.search(r"all-reduce over 4 ranks \(machines: 2\): [\d.]+ GB/s", said)
    assert "all-reduce within machines" in said
    assert re.search(r"links between machines: [\d.]+ GB/s \(median of 2\)", said)
