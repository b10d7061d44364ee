"""Which of several attention backends is the fastest on this machine: measured once, kept, read again.

The main rank measures while the others wait, and all take its choice. What is timed is the attention of one
layer alone, forward and backward: what else a backend brings about in a compiled model does not count.
"""

from __future__ import annotations

import importlib.metadata
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanochat.common import files, machine
from nanochat.common.errors import UserError
from nanochat.config.model_config import GPTConfig
from nanochat.distributed.world import World
from nanochat.model.attention import Layout, attention, block_masks, layout_of

TOKENS = 16_384  # of a measured pass, in rows of T: enough to fill a GPU, a fraction of a second in all
DOCUMENT_TOKENS = 512  # each document of a measured pass has so many, where attention stays within documents
WARM_UP, REPETITIONS = 3, 7
MAX_MS = 1e6  # in the file, of a backend
REASON_CHARS = 120  # of what a backend says that fails
KERNEL_MODULES = ("flash_attn_interface", "flash_attn", "triton")  # their versions decide beside PyTorch's


@dataclass(frozen=True)
class AttentionShape:
    """What the time of attention depends on, beside the dtype and the machine.

    Attributes:
        heads: query heads; two a head under differential attention.
        kv_heads: key and value heads.
        head_dim: width D of a head.
        sequence_len: context length T.
        window: earlier tokens that a query sees.
        documents: whether attention stays within documents.
    """

    heads: int
    kv_heads: int
    head_dim: int
    sequence_len: int
    window: int
    documents: bool = False

    @staticmethod
    def of(model: GPTConfig, documents: bool) -> AttentionShape:
        """Of a model; the window is the one that most of its layers have."""
        window = statistics.mode(model.windows)
        return AttentionShape(
            model.n_map, model.n_kv_head, model.head_dim, model.sequence_len, window, documents
        )


def key_of(shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> str:
    """The name of a measurement in the file: everything after whose change it is another one."""
    owners = importlib.metadata.packages_distributions()
    packages = sorted({owner for module in KERNEL_MODULES for owner in owners.get(module, ())})
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    parts = [
        machine.device_name(device),
        f"torch {torch.__version__}",
        *versions,
        str(dtype).removeprefix("torch."),
        f"{shape.heads}/{shape.kv_heads} heads of {shape.head_dim}",
        f"T {shape.sequence_len}",
        f"window {shape.window}",
    ]
    return ", ".join([*parts, "documents"] if shape.documents else parts)


def fastest(
    names: Sequence[str], milliseconds: Callable[[str], float], key: str, world: World
) -> tuple[str, str]:
    """The backend to use on every rank, and the reason in words: of value on the main rank only.

    Args:
        names: the backends that every rank can use; the same, in the same order, on all.
        milliseconds: measures one of them. One that raises is left out; if all do, the first name is taken.
        key: of this measurement in the file.
        world: the ranks.
    """
    name, reason = _kept_or_measured(names, milliseconds, key, world) if world.is_main else (names[0], "")
    index = world.max_over_ranks(names.index(name) if world.is_main else -1)
    return names[index], reason


def _kept_or_measured(
    names: Sequence[str], milliseconds: Callable[[str], float], key: str, world: World
) -> tuple[str, str]:
    """On the main rank. Nothing is kept of a measurement in which a backend failed: that may pass."""
    kept, notices = _read()
    times, source = kept.get(key, {}), "cached"
    if not all(name in times for name in names):
        times, failures = {}, []
        world.print0(f"measuring attention by {', '.join(names)} ...")
        for name in names:
            try:
                times[name] = milliseconds(name)
            except Exception as error:
                said = " ".join(str(error).split())[:REASON_CHARS]
                failures.append(f"{name} left out: {type(error).__name__}: {said}")
        unkept = failures or _write({**kept, key: times})
        source, notices = "not cached" if unkept else "now cached", notices + unkept
    if not times:
        return names[0], "; ".join(["none could be measured", *notices])
    ordered = sorted(names, key=lambda name: times.get(name, math.inf))
    figures = [f"{name} {times[name]:.2f} ms" for name in ordered if name in times]
    return ordered[0], "; ".join([", ".join([*figures, "measured on this GPU"]), source, *notices])


def _read() -> tuple[dict[str, dict[str, float]], list[str]]:
    """The measurements of the file, by key and backend; a file that cannot be used counts as empty."""
    path = files.attention_times_file()
    try:
        found: Any = files.read_json(path) if path.exists() else {}
    except (UserError, OSError):
        found = None
    return (found, []) if _well_formed(found) else ({}, [f"{path} is damaged and was passed over"])


def _well_formed(found: Any) -> bool:
    """Whether it is a dict of dicts of milliseconds."""
    return isinstance(found, dict) and all(
        isinstance(times, dict) and all(type(ms) in (int, float) and 0 < ms < MAX_MS for ms in times.values())
        for times in found.values()
    )


def _write(times: dict[str, dict[str, float]]) -> list[str]:
    """Keep the measurements; where that fails, the notice says so."""
    path = files.attention_times_file()
    try:
        files.write_json(path, times)
    except OSError as error:
        return [f"{path} could not be written ({error.strerror})"]
    return []


def one_pass(
    name: str, shape: AttentionShape, dtype: torch.dtype, device: torch.device
) -> Callable[[], tuple[Tensor, ...]]:
    """A function that runs one layer's attention forward and backward, and returns the gradients.

    Its inputs are random numbers of a generator of their own, (TOKENS / T, T, heads, head_dim).
    """
    t = shape.sequence_len
    rows = max(1, TOKENS // t)
    generator = torch.Generator(device).manual_seed(0)

    def draw(heads: int) -> Tensor:
        return torch.randn(rows, t, heads, shape.head_dim, device=device, dtype=dtype, generator=generator)

    qkv = tuple(draw(heads).requires_grad_() for heads in (shape.heads, shape.kv_heads, shape.kv_heads))
    grad = draw(shape.heads)
    if shape.documents:
        begins = torch.arange(t, device=device).expand(rows, t) % DOCUMENT_TOKENS == 0
        layout = layout_of(begins, name, [shape.window])
    else:
        layout = Layout(block_masks=block_masks(name, t, [shape.window], device))

    def run() -> tuple[Tensor, ...]:
        q, k, v = qkv
        return torch.autograd.grad(
            attention(q, k, v, window=shape.window, backend=name, layout=layout), qkv, grad
        )

    return run


def gpu_milliseconds(name: str, shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> float:
    """Median time of `one_pass` by CUDA's clock. What has to be compiled is compiled once, before."""
    files.keep_compiled()
    run = one_pass(name, shape, dtype, device)
    for _ in range(WARM_UP):
        run()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    times: list[float] = []
    for _ in range(REPETITIONS):
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)
