"""Machine and process: device, dtype, peak rate, memory, command and commit.

The device and the dtype are chosen once, from what is there, and passed on: no other module asks for them.
"""

from __future__ import annotations

import datetime
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanochat.common.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Dense bf16 peak in FLOP/s, by a part of the name that the driver reports; the first match counts, so that
# "h100 pcie" stands before "h100". Sources: the makers' data sheets (without sparsity).
PEAK_BF16_FLOPS_PER_S = {
    "gb200": 2.5e15,
    "b200": 2.25e15,
    "h200": 989e12,
    "h100 nvl": 835e12,
    "h100 pcie": 756e12,
    "h100": 989e12,
    "h20": 148e12,
    "h800": 989e12,
    "a100": 312e12,
    "a800": 312e12,
    "l40s": 362e12,
    "l4": 121e12,
    "a10": 125e12,
    "a6000": 155e12,
    "rtx 5090": 209.5e12,
    "rtx 4090": 165.2e12,
    "rtx 3090": 71e12,
    "mi300x": 1307e12,
}

# Oldest driver that runs what is built for any minor version of a CUDA, by major version (its release notes).
OLDEST_DRIVER = {12: 525, 13: 580}


@dataclass(frozen=True)
class Precision:
    """How numbers travel through the model.

    Attributes:
        compute_dtype: dtype of activations and matrix products; master weights stay fp32.
        attention: name of the attention backend (`nanochat.model.attention`).
        fp8: whether training computes the products of wide linear layers in fp8 (`nanochat.model.fp8`).
        fp8_head: whether also two of the three of the output head.
    """

    compute_dtype: torch.dtype
    attention: str
    fp8: bool = False
    fp8_head: bool = False


def detect_device(device_type: str = "auto", local_rank: int = 0, root: Path = Path("/")) -> torch.device:
    """The device of this rank.

    A GPU that torch cannot use is no reason to take the CPU in silence: it would take days instead of hours.
    Hidden with CUDA_VISIBLE_DEVICES="", it does not count.

    Args:
        device_type: "auto" for the best that is there, or "cuda", "mps" or "cpu".
        local_rank: number of the GPU.
        root: where the files of the system are.

    Raises:
        UserError: the device asked for is not there, or there is a GPU that torch cannot use.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch has to say of an old driver is part of the error below
        has_cuda = torch.cuda.is_available()
    present = {"cuda": has_cuda, "mps": torch.backends.mps.is_available(), "cpu": True}
    there = [kind for kind, is_there in present.items() if is_there]
    if device_type in ("auto", "cuda") and not has_cuda and (driver := nvidia_driver(root)):
        raise UserError(
            f"--device-type={device_type}: {_why_no_cuda(driver)}, or take the CPU: --device-type=cpu, or "
            "for all commands CUDA_VISIBLE_DEVICES= in the environment."
        )
    chosen = there[0] if device_type == "auto" else device_type
    if chosen not in there:
        has = ", ".join(there)
        raise UserError(f"--device-type={chosen}: not available on this machine, which has: {has}.")
    return torch.device(chosen, local_rank) if chosen == "cuda" else torch.device(chosen)


def nvidia_driver(root: Path = Path("/")) -> str:
    """Version of the NVIDIA driver where this process may use a GPU of it, else "".

    A container sees the driver of its host in /proc, and of its GPUs only those that it was given in /dev.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    if not re.match(r"\s*(\d|GPU-|MIG-)", visible):  # "", "-1", "NoDevFiles": hidden on purpose
        return ""
    loaded = root / "proc/driver/nvidia/version"
    if loaded.is_file() and any(map(_can_be_opened, root.glob("dev/nvidia[0-9]*"))):
        found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", loaded.read_text("utf-8", errors="replace"))
        return found.group(1) if found else "unknown"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]  # the only trace under WSL
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):  # there is none, or a driver that does not answer
        return ""
    versions = re.findall(r"^\d+\.[\d.]+", done.stdout, re.MULTILINE)
    return versions[0] if versions and done.returncode == 0 else ""


def _can_be_opened(path: Path) -> bool:
    """Whether this process may use a device; a control group may forbid it though its file allows it."""
    try:
        path.open("rb").close()
    except OSError:
        return False
    return True


def _why_no_cuda(driver: str) -> str:
    """What keeps torch from a GPU that is there, and what to do about it."""
    newest = max(OLDEST_DRIVER.values())
    major = int(driver.partition(".")[0]) if driver[0].isdigit() else newest
    runs = max((cuda for cuda, oldest in OLDEST_DRIVER.items() if major >= oldest), default=0)
    remedies = [f"a driver of {newest} or newer"] if major < newest else []
    if runs:  # the address of the packages is another for each CUDA
        remedies.insert(0, f"a torch>=2.9 for CUDA {runs} (pytorch.org, Start Locally, has the pip command)")
    here = f"there is a GPU with the NVIDIA driver {driver}, and torch {torch.__version__}"
    if torch.version.cuda is None:
        return f"{here} is built without CUDA. Install {', '.join(remedies)}"
    needed = OLDEST_DRIVER.get(int(torch.version.cuda.partition(".")[0]), 0)
    if major < needed:
        needs = f"CUDA {torch.version.cuda}, which needs {needed} or newer"
        return f"{here} is built for {needs}. Install {', '.join(remedies)}"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        reason = "it does not say why"
    except RuntimeError as error:
        reason = str(error).partition("\n")[0].partition(" Please ")[0].rstrip(". ")
    return (
        f"{here} for CUDA {torch.version.cuda} cannot use it: {reason}. "
        "Look at what nvidia-smi and CUDA_VISIBLE_DEVICES say"
    )


def grow_segments() -> None:
    """Let CUDA's allocator grow its segments in place, unless the user has set it up. Before CUDA starts.

    A pass that is measured, a compilation and the training itself take unlike sizes from one pool: segments
    of fixed size leave holes that none of the next fits, and memory runs out with some of it free.
    """
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    if sys.platform == "linux" and not any(name in os.environ for name in names):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def choose_dtype(device: torch.device, requested: str = "auto") -> tuple[torch.dtype, str]:
    """The compute dtype and why: bf16 where the hardware multiplies it natively, else fp16 or fp32.

    fp16 is for GPUs that have matrix units for it alone, Volta and Turing; training then scales the loss. A
    CPU multiplies bf16 natively if it has AVX512-BF16 or AMX.
    """
    if requested != "auto":
        return DTYPES[requested], "asked for"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        native = capability >= (8, 0)
        if (7, 0) <= capability < (8, 0):
            return torch.float16, "this GPU multiplies fp16 natively, and not bf16"
    else:
        flags = _proc("cpuinfo").get("flags", "").split()
        native = device.type == "cpu" and not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags)
    if native:
        return torch.bfloat16, f"this {device.type} multiplies bf16 natively"
    return torch.float32, f"this {device.type} does not multiply bf16 natively"


def choose_compile(device: torch.device, requested: str = "auto") -> tuple[bool, str]:
    """Whether torch.compile is used, and why: on CUDA yes, on a CPU not.

    On 2 cores at depth 4 (LOG 2026-11-21) a compiled step took 8.8 s against 9.0 s, and started 65 s later
    (15 s from a warm cache): the uncompiled one is ahead for the first 300 steps.

    Raises:
        UserError: it is asked for, and this machine lacks what it needs.
    """
    if requested == "off":
        return False, "as asked"
    missing = _missing_compiler(device)
    if requested == "on" and missing:
        raise UserError(f"--compile=on: {missing}. Install what is missing or use --compile=auto.")
    if requested == "on":
        return True, "as asked"
    if device.type != "cuda":
        return False, f"a {device.type} reaches 100 steps sooner without"
    return not missing, missing or "a GPU is faster with it"


def _missing_compiler(device: torch.device) -> str:
    """Why torch.compile cannot run here, or ""."""
    if device.type == "cuda":
        return "" if importlib.util.find_spec("triton") else "the package triton is not installed"
    if device.type == "cpu" and any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        return ""
    return "there is no C++ compiler" if device.type == "cpu" else f"not supported on {device.type}"


def require_fp8(device: torch.device, compute_dtype: torch.dtype) -> None:
    """Refuse --fp8 where it cannot be had.

    Raises:
        UserError: the GPU has no fp8 matrix units that we use, or the other numbers are not bf16.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        raise UserError(
            f"--fp8: needs a Hopper GPU (sm90) or later, the device is {device_name(device)}. Leave it out."
        )
    if compute_dtype != torch.bfloat16:
        raise UserError(f"--fp8: goes with bfloat16, the compute dtype is {compute_dtype}. Use --dtype=auto.")


def device_name(device: torch.device) -> str:
    """The maker's name of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _proc("cpuinfo").get("model name") or platform.processor() or device.type


def measured_flops_per_s(
    device: torch.device, dtype: torch.dtype, size: int = 2048, seconds: float = 0.3
) -> float:
    """Rate of a square matrix product, in FLOP/s: the best of several short runs.

    Args:
        device: where to measure.
        dtype: of both factors.
        size: rows and columns of both factors; 8192 or so on a GPU.
        seconds: how long to measure.
    """
    a = torch.randn(size, size, device=device, dtype=torch.float32).to(dtype)
    (a @ a)[0, 0].item()  # the read waits for the device
    best, stop = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < stop:
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


@dataclass(frozen=True)
class Speed:
    """What one device could do at most, in FLOP/s.

    Attributes:
        peak_flops: of the table for known GPUs, else as measured.
        peak_source: "table" or "measured".
        matmul_flops: of a large matrix product, measured here and now.
    """

    peak_flops: float
    peak_source: str
    matmul_flops: float


def speed(device: torch.device, dtype: torch.dtype) -> Speed:
    """Look the device up, and measure it for 0.3 s."""
    # CPUs emulate fp16: there a product of 2048 takes 40 s.
    size = 8192 if device.type == "cuda" else 256 if dtype == torch.float16 else 2048
    measured = measured_flops_per_s(device, dtype, size)
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device).lower()
        for part, peak in PEAK_BF16_FLOPS_PER_S.items():
            if part in name:
                return Speed(peak, "table", measured)
    return Speed(measured, "measured", measured)


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), listing: Path = Path("/proc/self/cgroup")) -> float | None:
    """Cores' worth of time that a container may use, by the tightest control group; None for all."""
    quotas = []
    for line in listing.read_text("utf-8").splitlines() if listing.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / "cpu" if controllers else root
        folder = base / path.strip("/")
        # A container may see its own group as the root, whatever it is called outside.
        groups = [base, *(group for group in (folder, *folder.parents) if base in group.parents)]
        quotas += [_quota_of(group) for group in groups]
    return min((quota for quota in quotas if quota), default=None)


def _quota_of(group: Path) -> float | None:
    """Quota over period of one control group, of either version."""
    names = ("cpu.max",) if (group / "cpu.max").exists() else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    try:
        quota, period = " ".join((group / name).read_text("utf-8") for name in names).split()
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # not there, or "max"
        return None


def quota_hint(device: torch.device) -> str:
    """What to do where a container may use less than the cores it sees, and waiting threads spin."""
    quota = cpu_quota() if device.type == "cpu" else None
    passive = os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE"
    threads = torch.get_num_threads()
    if quota is None or passive or threads <= max(1, quota):
        return ""
    return (
        f"hint: {threads} threads compute, and this container may use {quota:g} cores: what they spend on "
        "waiting for each other is lost. Faster with OMP_WAIT_POLICY=PASSIVE in the environment."
    )


def available_memory_bytes(device: torch.device) -> int | None:
    """What can still be allocated: of the GPU where there is one, else of the machine; None if not told."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return _bytes_in_proc("meminfo", "MemAvailable") if device.type == "cpu" else None


def total_memory_bytes(device: torch.device) -> int | None:
    """All memory of the GPU where there is one, else of the machine; None if not told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return _bytes_in_proc("meminfo", "MemTotal") if device.type == "cpu" else None


def peak_memory_bytes(device: torch.device | None = None) -> int:
    """Most memory held so far: of the GPU where one is given, else of this process; 0 if not told.

    Linux's VmHWM comes first: what getrusage calls the peak also counts the process that forked this one.
    """
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if peak := _bytes_in_proc("self/status", "VmHWM"):
        return peak
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _proc(name: str) -> dict[str, str]:
    """The fields of a file of /proc, such as cpuinfo: of several with one name, the last; none off Linux."""
    path = Path("/proc") / name
    lines = path.read_text("utf-8", errors="replace").splitlines() if path.exists() else []
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _bytes_in_proc(name: str, field: str) -> int | None:
    text = _proc(name).get(field)
    return int(text.removesuffix("kB")) * 1024 if text else None


def process_age_seconds() -> float | None:
    """Seconds since this process was started, imports included; None where the system does not tell."""
    stat = Path("/proc/self/stat")
    if not stat.exists():
        return None
    started_ticks = int(stat.read_text("utf-8").rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK")


def describe(device: torch.device) -> dict[str, Any]:
    """The machine, for config.json and the report."""
    return {
        "device": device_name(device),
        "device_type": device.type,
        "cpu_threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
    }


def provenance() -> dict[str, str | None]:
    """What ran, and when: the command, the commit of the code, the day.

    The commit ends in + where a file differs from it, and is None outside a git checkout.
    """
    command = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    root = Path(__file__).resolve().parents[2]
    commit = None
    if (root / ".git").exists():  # an installed package may lie in somebody else's repository
        try:
            done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=10)
            commit = done.stdout.strip() or None
        except (OSError, subprocess.TimeoutExpired):  # no git here, or a disk that does not answer
            pass
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return {"command": shlex.join(sys.orig_argv[1:]), "commit": commit, "date": today}
