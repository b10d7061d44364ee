"""What the machine can do, read from files as Linux has them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nanochat.common import machine


def groups(folder: Path, own: str, files: dict[str, str]) -> tuple[Path, Path]:
    """The root of the control groups, and what /proc/self/cgroup says."""
    root, proc = folder / "cgroup", folder / "own"
    root.mkdir()
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    proc.write_text(own + "\n")
    return root, proc


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/", {"cpu.max": "50000 100000"}, 0.5),
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/", {}, None),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "150000 100000"}, 1.5),
        ("0::/a/b", {"a/b/cpu.max": "300000 100000", "a/cpu.max": "150000 100000"}, 1.5),
        ("0::/outside/name", {"cpu.max": "25000 50000"}, 0.5),
        ("4:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "50000", "cpu/a/cpu.cfs_period_us": "100000"}, 0.5),
        ("4:cpu:/a", {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2.0),
        ("4:cpu:/a", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, None),
        ("3:memory:/a", {"cpu/a/cpu.cfs_quota_us": "5", "cpu/a/cpu.cfs_period_us": "10"}, None),
        ("0::/", {"cpu.max": "nonsense"}, None),
    ],
)
def test_the_quota_of_cores_is_that_of_the_tightest_group(
    tmp_path: Path, own: str, files: dict[str, str], expected: float | None
) -> None:
    assert machine.cpu_quota(*groups(tmp_path, own, files)) == expected


def test_there_is_no_quota_where_there_are_no_control_groups(tmp_path: Path) -> None:
    assert machine.cpu_quota(tmp_path / "nowhere", tmp_path / "nothing") is None


@pytest.mark.parametrize(
    ("quota", "threads", "policy", "hinted"),
    [
        (0.5, 2, "", True),
        (1.5, 2, "ACTIVE", True),
        (0.5, 2, "passive", False),
        (0.5, 1, "", False),  # alone, it waits for nobody
        (2.0, 2, "", False),
        (None, 2, "", False),
    ],
)
def test_a_hint_is_given_where_threads_wait_in_a_container_of_fewer_cores(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, threads: int, policy: str, hinted: bool
) -> None:
    monkeypatch.setattr(machine, "cpu_quota", lambda: quota)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    assert bool(machine.quota_hint(torch.device("cpu"))) is hinted
    assert machine.quota_hint(torch.device("meta")) == ""
