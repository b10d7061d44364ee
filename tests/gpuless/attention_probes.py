"""What attention is asked of a pretended H100: which backend it gets, its graphs, what scoring compiles."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat.common.machine import Precision
from nanochat.config import plan as planning
from nanochat.config.arguments import TrainArgs
from nanochat.engine import KVCache
from nanochat.model import attention_backends
from nanochat.model.attention import downloaded_kernels
from nanochat.model.gpt import GPT
from nanochat.serve.slots import SlotCache

GPU = torch.device("cuda:0")
STUBS = Path(__file__).with_name("stubs")
VOCABULARY = 512
ROWS = 4


def _packages(which: list[str]) -> None:
    """Of the stubs, leave these on the path: "flash" (FlashAttention 2 and 3), "fa4", "hub" (downloads)."""
    sys.path[:] = [folder for folder in sys.path if not Path(folder).is_relative_to(STUBS)]
    sys.path[:0] = [str(STUBS if name == "flash" else STUBS / name) for name in which]


def _model(backend: str, depth: int = 2, **flags: Any) -> GPT:
    plan = planning.plan(TrainArgs(depth=depth, max_seq_len=1024, **flags), VOCABULARY, 1)
    with GPU:
        bos = 0 if plan.model.document_mask else None
        return GPT(plan.model, Precision(torch.bfloat16, backend), bos)


def chosen(cases: list[list[Any]]) -> list[list[str]]:
    """Backend and reason for each case: packages, the GPU's major compute capability, what is asked for."""
    found = []
    for packages, major, requested in cases:
        _packages(packages)
        for name in list(sys.modules):
            if name.partition(".")[0] in ("flash_attn", "flash_attn_interface", "kernels"):
                del sys.modules[name]
        downloaded_kernels.clear()
        attention_backends._package_fault.cache_clear()
        torch.cuda.get_device_capability = lambda device=None, major=major: (major, 0)
        found.append(list(attention_backends.choose_backend(GPU, requested)))
    return found


def graphs(backends: list[str], kinds: list[str], packages: list[str]) -> dict[str, list[int]]:
    """Graphs and breaks of the forward pass, by backend, kind of attention and whether documents are kept.

    The backward pass is run, operator by operator, so that its rules are met too.
    """
    _packages(packages)
    if "hub" in packages:
        attention_backends.choose_backend(GPU)
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    found = {}
    with FakeTensorMode():  # one: masks are kept from model to model
        for backend, kind, documents in itertools.product(backends, kinds, (False, True)):
            torch._dynamo.reset()
            counters.clear()
            traced: list[str] = []

            def count(module: torch.fx.GraphModule, inputs: Any, traced: list[str] = traced) -> Any:
                traced.append("")
                return module.forward

            model = _model(backend, attention_kind=kind, document_mask=documents)
            ids = torch.zeros(ROWS, 1024, dtype=torch.int64, device=GPU)
            hidden = torch.compile(model.forward, backend=count, fullgraph=True, dynamic=False)(ids)
            hidden.sum().backward()
            breaks = sum(counters["graph_break"].values())
            found[f"{backend} {kind} {'documents' if documents else 'rows'}"] = [len(traced), breaks]
    return found


def varlen_calls(documents: bool, depth: int = 4) -> dict[str, int]:
    """How often a compiled pass by varlen makes row starts, and calls the flash kernel or another one."""
    calls: Counter[str] = Counter()
    import torch.nn.attention.varlen  # registers the operator

    schema = torch.ops.torch_attn._varlen_attn.default._schema
    flash = SDPBackend.FLASH_ATTENTION.value

    def count(module: torch.fx.GraphModule, inputs: Any) -> Any:
        for node in module.graph.nodes:
            calls["arange"] += "arange" in str(node.target) or "iota" in str(node.target)
            if "_varlen_attn.default" in str(node.target):
                given = dict(zip((a.name for a in schema.arguments), node.args, strict=False))
                calls["flash" if given.get("backend", flash) == flash else "other"] += 1
        return module.forward

    with FakeTensorMode():
        model = _model("varlen", depth, document_mask=documents)
        ids = torch.zeros(ROWS, 1024, dtype=torch.int64, device=GPU)
        inductor_like = aot_autograd(fw_compiler=count, partition_fn=min_cut_rematerialization_partition)
        torch.compile(model.forward, backend=inductor_like, dynamic=False)(ids)
    return +calls


def scoring(backend: str, documents: bool) -> dict[str, int]:
    """Shapes that passes of scoring and decoding had, and frames that Dynamo compiled for them."""
    shapes = [(b, tq, tk) for b in (1, 3) for tq in (1, 5, 130, 257) for tk in (257, 300, 511, 600, 1024)]
    with FakeTensorMode(), torch.no_grad():
        model = _model(backend, document_mask=documents)
        for b, tq, tk in shapes:
            ids = torch.zeros(b, tk, dtype=torch.int64, device=GPU)
            cache = KVCache(model, b, tk)
            if tk > tq:
                model(ids[:, : tk - tq], cache)
            else:
                model(ids)
            model(ids[:, tk - tq :], cache)
    return {"shapes": len(set(shapes)), "frames": sum(counters["frames"].values())}


class _Operators(TorchDispatchMode):
    """Counts the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def serving(backend: str, packages: list[str]) -> dict[str, int]:
    """Steps of slots of different lengths: frames compiled, and calls of the kernel for such rows."""
    _packages(packages)
    with FakeTensorMode(), torch.no_grad():
        model = _model(backend, 4, window_pattern="SSSL")
        cache = SlotCache(model, 4, 1024)
        for slot, length in enumerate((5, 130, 700, 64)):
            cache.read(slot, [1] * length)
        with _Operators() as operators:
            for tokens in ([1, None, 3, 4], [1, 2], [1, 2, 3, 4]):
                cache.step(tokens)
    kernel = "pretended_fa3.behind_cache.default"
    return {"frames": sum(counters["frames"].values()), "calls": operators.calls[kernel]}
