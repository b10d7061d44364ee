"""What evaluation asks of a pretended H100: what crosses between host and device, and what is compiled.

Fake tensors have no values. Where a value is read on purpose, on the host, it is zero here.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch._subclasses import fake_impls
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree

from nanochat import engine
from nanochat.common.machine import Precision
from nanochat.config import plan as planning
from nanochat.config.arguments import TrainArgs
from nanochat.data import train_loader
from nanochat.distributed.world import World
from nanochat.evaluation import bits_per_byte
from nanochat.evaluation.core import scoring
from nanochat.evaluation.core.batching import Span
from nanochat.model.gpt import GPT
from tests.gpuless.probes import GPU, VOCABULARY, Watch

ZERO = {torch.bool: False, torch.int64: 0}
BOS = 0


class Crossings(Watch):
    """Counts copies by their direction, and values that are read one by one from the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        out = func(*args, **(kwargs or {}))
        if name == "aten._local_scalar_dense.default" and args[0].device.type == "cuda":
            self.crossings["value read"] += 1
        devices = [t.device.type for t in _pytree.tree_leaves((args, out)) if isinstance(t, torch.Tensor)]
        if ("copy" in name or name.startswith("aten._to")) and len(set(devices)) > 1:
            source = args[1].device.type if name.startswith("aten.copy_") else args[0].device.type
            self.crossings["to host" if source == "cuda" else "to device"] += 1
        return out


def fake() -> FakeTensorMode:
    """Fake tensors, of which every value reads as zero, and which can be pinned."""
    rules, aten = fake_impls.op_implementations_dict, torch.ops.aten
    rules[aten._local_scalar_dense.default] = lambda mode, func, tensor: ZERO.get(tensor.dtype, 0.0)
    rules[aten._pin_memory.default] = lambda mode, func, tensor, device=None: tensor
    return FakeTensorMode(allow_non_fake_inputs=True)


@contextlib.contextmanager
def watched() -> Iterator[Counter[str]]:
    """Within, tensors are fake and crossings are counted."""
    with fake(), Crossings() as watch:
        yield watch.crossings


def a_model(backend: str, **flags: Any) -> GPT:
    """A model of fake weights on the pretended device."""
    plan = planning.plan(TrainArgs(depth=2, max_seq_len=512, **flags), VOCABULARY, 1)
    with GPU:
        return GPT(plan.model, Precision(torch.bfloat16, backend), BOS if plan.model.document_mask else None)


def spans_of(count: int, seed: int) -> list[Span]:
    """Options of made-up examples: two that share a prompt, of many lengths."""
    random = np.random.default_rng(seed)
    spans = []
    for _ in range(count):
        prompt = random.integers(1, VOCABULARY, random.integers(30, 300)).astype(np.int32)
        for _ in range(2):
            end = random.integers(1, VOCABULARY, random.integers(1, 9)).astype(np.int32)
            spans.append(Span(np.concatenate((prompt, end)), len(prompt)))
    return spans


def score(model: GPT, examples: int, seed: int = 0) -> int:
    """Score examples of CORE in small batches; returns how many batches they were."""
    launched = []
    launch = scoring._launch

    def counted(*args: Any) -> Any:
        launched.append(launch(*args))
        return launched[-1]

    scoring._launch = counted
    scorer, clock = scoring.GPTScorer(model), scoring.Clock()
    try:
        with scorer.room(scorer.longest_tokens):
            scoring.score_spans(scorer, spans_of(examples, seed), 2048, with_argmax=True, clock=clock)
    finally:
        scoring._launch = launch
    return len(launched)


def some_batches(rows: int, length: int, last: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Three validation batches on the device, of which the last has other rows."""
    sizes = (rows, rows, last)
    return [(torch.ones(n, length, dtype=torch.int64, device=GPU),) * 2 for n in sizes]


def tokenizer() -> Any:
    """What the engine needs of one: here no token ends a text."""
    return dataclasses.make_dataclass("Tokenizer", [("bos_id", int, 1)])()


def crossings() -> dict[str, dict[str, int]]:
    """What crosses in 40 examples of CORE, three batches of validation, reading rows, and five tokens."""
    found: dict[str, dict[str, int]] = {}
    world, token_bytes = World.single_process(GPU), np.ones(VOCABULARY, np.int64)
    # Without values there is no figure at the end: what is counted is what grows with the batches.
    bits_per_byte._summed = lambda values, world: [1.0] * values.numel()
    bits_per_byte._histogram = lambda *_: torch.zeros(bits_per_byte.HISTOGRAM_BINS)
    with watched() as counts:
        model = a_model("sdpa")
        batches = some_batches(4, 512, 2)

        def since(name: str, **more: int) -> None:
            found[name] = {**counts, **more}
            counts.clear()

        counts.clear()
        since("CORE", batches=score(model, 40))
        bits_per_byte.evaluate(model, batches, token_bytes, world)
        since("validation")
        bits_per_byte.profile_bpb(model, batches, token_bytes, world, BOS)
        since("profile")
        train_loader.moved(np.ones((4, 513), np.int32), GPU)
        since("rows")
        sampling = engine.Sampling(5, temperature=0.7, top_k=50)
        engine.Engine(model, tokenizer()).generate([[2, 3, 4], [5, 6, 7]], sampling, 3)
        since("decoding")
    return found


def compiled(backend: str, **flags: Any) -> dict[str, int]:
    """Graphs made in a training step and its first validation, and afterwards by all that evaluates."""
    import torch._dynamo
    from torch._dynamo.utils import counters

    made: list[str] = []

    def count(module: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        made.append("graph")
        return module.forward

    real = torch.compile
    torch.compile = lambda *function, **options: real(*function, **options | {"backend": count})
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    found: dict[str, int] = {}

    def since(name: str) -> None:
        found[name] = len(made)
        made.clear()

    rows, length = 4, 512
    token_bytes, world = np.ones(VOCABULARY, np.int64), World.single_process(GPU)
    bits_per_byte._summed = lambda values, world: [1.0] * values.numel()
    with fake():
        model = a_model(backend, **flags)
        model.compile_for(rows)
        ids = torch.ones(rows, length, dtype=torch.int64, device=GPU)
        model.loss(ids, ids).backward()
        since("training")
        bits_per_byte.evaluate(model, some_batches(rows, length, rows), token_bytes, world)
        since("first validation")
        for last in (3, 1):
            bits_per_byte.evaluate(model, some_batches(rows, length, last), token_bytes, world)
        since("validation")
        score(model, 6)
        since("first examples of CORE")
        for seed in range(1, 4):
            score(model, 6, seed)
        since("CORE")
        sampling = engine.Sampling(2, temperature=0.0)
        prompts = [list(range(2, 2 + size)) for size in (3, 5, 9, 14, 20, 33, 47, 64, 65, 66)]
        engine.Engine(model, tokenizer()).generate(prompts, sampling, 2)
        since("decoding")
        model.loss(ids, ids).backward()
        since("training again")
    return {**found, "breaks": sum(counters["graph_break"].values())}
