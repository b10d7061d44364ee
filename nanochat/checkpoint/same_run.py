"""Whether a checkpoint is of the run that wants to go on from it: the one place that refuses. Pure.

What decides the weights or the data may not change. The dtype and fp8 are of that kind; the attention
backend, torch.compile, recomputation and the number of ranks are not, although their sums are rounded in
another order: they are how a machine computes, and a run may go on on another machine.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nanochat.checkpoint.compatibility import completed
from nanochat.common.errors import UserError
from nanochat.config.arguments import TrainArgs
from nanochat.config.plan import Plan

# What --extend lets through: the steps, and what a recipe derives from them.
HORIZON = {
    "steps",
    "schedule.steps",
    "schedule.warmup_steps",
    "schedule.warmdown_steps",
    "schedule.matrix_weight_decay",
    "schedule.batch_stages",
    "schedule.window_stages",
    "groups.matrix.weight_decay",
}


def fixed_fields(cls: type[Any], names: Iterable[str]) -> list[str]:
    """Those of the names that a resumed run may not change: all whose metadata does not say that it may.

    The guard is closed by default: a new flag or field is fixed, and so is one of a later version that this
    one does not know.
    """
    open_fields = {item.name for item in dataclasses.fields(cls) if "resume" in item.metadata}
    return sorted(set(names) - open_fields)


def _flat(value: Any, name: str) -> dict[str, Any]:
    """Leaves of nested dictionaries by dotted name."""
    if not isinstance(value, dict):
        return {name: value}
    return {leaf: v for key, inner in value.items() for leaf, v in _flat(inner, f"{name}.{key}").items()}


def _fixed(plan: dict[str, Any], fingerprints: dict[str, str]) -> dict[str, Any]:
    """What may not change, by the name under which a difference is shown."""
    args = plan["args"]
    out = {f"--{name.replace('_', '-')}": args[name] for name in fixed_fields(TrainArgs, args)}
    known = [item.name for item in dataclasses.fields(Plan) if item.name != "args"]
    for name in fixed_fields(Plan, known):
        out |= _flat(plan.get(name), name)
    return out | {f"{name} hash": value for name, value in fingerprints.items()}


def require_same_run(
    meta: dict[str, Any], plan: Plan, fingerprints: dict[str, str], folder: Path
) -> list[str]:
    """Compare the run of a checkpoint with the run that would go on from it.

    Args:
        meta: what the checkpoint's state.json holds.
        plan: of the run now; `plan.args.extend` lets a changed horizon through.
        fingerprints: hashes of corpus and tokenizer now.
        folder: the checkpoint, for the message.

    Returns:
        The differences that were let through.

    Raises:
        UserError: any other difference; each is shown with both values.
    """
    saved = completed(meta["plan"])
    asked_then, asked_now = saved["args"], dataclasses.asdict(plan.args)
    if asked_then.get("dtype") == "auto":  # an early checkpoint, which does not say what auto was there
        asked_then = asked_then | {"dtype": asked_now["dtype"]}
    # Through JSON, where tuples become lists.
    then = json.loads(json.dumps(_fixed(saved | {"args": asked_then}, meta["fingerprints"])))
    now = json.loads(json.dumps(_fixed(plan.to_dict(), fingerprints)))
    absent = "nothing"
    changed = {
        name: f"{name}: {then.get(name, absent)!r} then, {now.get(name, absent)!r} now"
        for name in sorted(then.keys() | now.keys())
        if then.get(name, absent) != now.get(name, absent)
    }
    allowed = {name for name in changed if plan.args.extend and name in HORIZON}
    if refused := [text for name, text in changed.items() if name not in allowed]:
        advice = _advice(list(changed), asked_then, asked_now)
        raise UserError(
            f"{folder}: cannot be resumed, since these differ: {'; '.join(refused)}. "
            f"{advice}or start another run with --run."
        )
    return [changed[name] for name in sorted(allowed)]


def _advice(changed: list[str], then: dict[str, Any], now: dict[str, Any]) -> str:
    """What helps against the differences, from the flags that were given then and now."""
    asked = [item.name for item in dataclasses.fields(TrainArgs) if item.metadata.get("resume") == "planned"]
    if "groups.value_embedding.lr" in changed and "scalar_lr" not in then and now["embedding_lr"] is not None:
        return (
            "The version that made it left the value embeddings at the recipe's rate under --embedding-lr: "
            "finish the run with that version, "
        )
    in_plan = not any(name.startswith("--") or name.endswith(" hash") for name in changed)
    if in_plan and all(then.get(name) == now[name] for name in asked):
        return f"The recipe {now['recipe']!r} has changed since: put its constants back, "
    if HORIZON.issuperset(changed):
        return "Change the horizon with --extend, "
    return "Give the same arguments as before, "
