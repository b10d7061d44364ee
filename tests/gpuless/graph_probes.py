"""Graphs that Dynamo makes of the passes of a model, counted and not compiled."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from nanochat.config import plan as planning
from nanochat.config.arguments import TrainArgs
from nanochat.config.model_config import ATTENTION_KINDS
from nanochat.config.recipes import RECIPES
from nanochat.engine import KVCache
from nanochat.model.attention import BACKENDS
from nanochat.model.gpt import GPT
from nanochat.train import run
from tests.gpuless.probes import GPU, VOCABULARY, fake_model, fake_state, fake_tensors, fake_world

# What a compiled pass depends on, and all its values.
FACTORS: dict[str, Sequence[Any]] = {
    "backend": BACKENDS,
    "document_mask": (False, True),
    "window_pattern": ("SL", "L"),
    "recompute": ("none", "mlp", "block"),
    "bigram": (False, True),
    "attention_kind": tuple(ATTENTION_KINDS),
}
SCORED = ((3, 70), (8, 33), (1, 700), (24, 9))  # rows and positions of batches of tasks, of every size


class Counted:
    """Stands before torch.compile: counts graphs instead of compiling them, and breaks with an error."""

    def __init__(self) -> None:
        import torch._dynamo

        self.graphs = 0
        real = torch.compile
        torch.compile = lambda function, **options: real(
            function, **options | {"backend": self._count, "fullgraph": True}
        )
        torch._dynamo.config.fail_on_recompile_limit_hit = True

    def _count(self, module: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs += 1
        return module.forward


def passes(pairs_only: bool, backends: Sequence[str] = BACKENDS) -> dict[str, Any]:
    """Forward passes of two layers under combinations of FACTORS, each in one graph or not.

    Args:
        pairs_only: few combinations, among which are all pairs of values, with gradients; else every one,
            with gradients and without.
        backends: of attention, without those whose package has no stub here.

    Returns:
        "backends" that were tried, the number of "combinations", and of these the "wrong" ones: what they
        gave instead of one graph.
    """
    import torch._dynamo

    counted, wrong, tried = Counted(), [], 0
    known = [name for name in backends if name != "fa2" or importlib.util.find_spec("flash_attn")]
    for choice in combinations(FACTORS | {"backend": known}, pairs_only):
        torch._dynamo.reset()
        counted.graphs, tried = 0, tried + 1
        try:
            with fake_tensors():
                _pass(evaluates=not pairs_only, **choice)
            wanted = 1 if pairs_only else 2
            problem = "" if counted.graphs == wanted else f"{counted.graphs} graphs instead of {wanted}"
        except Exception as error:
            problem = f"{type(error).__name__}: {str(error)[:600]}"
        if problem:
            wrong.append([choice, problem])
    return {"backends": known, "combinations": tried, "wrong": wrong}


def _pass(backend: str, evaluates: bool, **flags: Any) -> None:
    plan = planning.plan(TrainArgs(depth=2, **flags), VOCABULARY, 8)
    model = fake_model(plan, backend)
    model.compile_for(4)
    ids = torch.zeros(4, plan.model.sequence_len, dtype=torch.int64, device=GPU)
    model._hidden(ids)
    if evaluates:
        with torch.no_grad():
            model._hidden(ids)


def combinations(factors: dict[str, Sequence[Any]], pairs_only: bool) -> Iterator[dict[str, Any]]:
    """Every combination of values, or, greedily, few that have each pair of values of two factors."""
    names = list(factors)
    everything = [dict(zip(names, values, strict=True)) for values in itertools.product(*factors.values())]
    if not pairs_only:
        yield from everything
        return
    missing = set().union(*(_pairs(choice) for choice in everything))
    while missing:
        best = max(everything, key=lambda choice: len(missing & _pairs(choice)))
        missing -= _pairs(best)
        yield best


def _pairs(choice: dict[str, Any]) -> set[Any]:
    return set(itertools.combinations(choice.items(), 2))


def recipes(backend: str, names: Sequence[str] = tuple(RECIPES)) -> dict[str, dict[str, int]]:
    """Graphs of a run of each recipe at depth 2: of its start, its stages, and of scoring.

    Args:
        backend: of attention.
        names: of recipes.

    Returns:
        By recipe the graphs counted "before" the first step (passes of later stages, as a run makes them),
        in the first "step" of each stage, in the "second" one, in the first "validation" of each stage, in
        the second one ("again"), in "core" and in "decoding".
    """
    import torch._dynamo

    counted, world, found = Counted(), fake_world(8), {}
    for name in names:
        torch._dynamo.reset()
        counted.graphs = 0
        found[name] = _run(counted, world, name, backend)
    return found


def _run(counted: Counted, world: Any, recipe: str, backend: str) -> dict[str, int]:
    flags = TrainArgs(depth=2, recipe=recipe, total_batch_size=393_216, device_batch_size=1)
    plan = planning.plan(flags, VOCABULARY, 8)
    stages = [first for first, _ in plan.schedule.window_stages] or [0]
    graphs = dict.fromkeys(("before", "step", "second", "validation", "again", "core", "decoding"), 0)

    def note(part: str) -> None:
        graphs[part] += counted.graphs
        counted.graphs = 0

    with fake_tensors():
        state = fake_state(plan, world, backend, micro_batches=1)
        model, ids = state.model, state.loader.next_batch()[0][0]
        model.compile_for(len(ids))
        state.optimizer.compile_updates()
        for first in stages[1:]:
            model.use_windows(plan.windows_at(first))
            model.loss(ids, ids).backward()
            model.zero_grad(set_to_none=True)
        note("before")
        for first in stages:
            model.use_windows(plan.windows_at(first))
            state.step = first
            for part in ("step", "second"):
                run.train_step(plan, state, world)
                note(part)
            for part in ("validation", "again"):
                with torch.no_grad():
                    model.loss(ids, ids, reduction="none")
                note(part)
        _score(model, counted, note)
    return graphs


@torch.no_grad()
def _score(model: GPT, counted: Counted, note: Any) -> None:
    """Batches of tasks of every shape, and a prompt with tokens after it."""
    for shape in SCORED:
        batch = torch.zeros(shape, dtype=torch.int64, device=GPU)
        model.token_losses(batch, batch)
    note("core")
    cache = KVCache(model, 2, 40)
    for length in (7, 1, 1, 1):
        model.logits(torch.zeros(2, length, dtype=torch.int64, device=GPU), cache, last_only=True)
    note("decoding")
