"""Whether a checkpoint is of the run that wants to go on from it. Pure."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from nanochat.config import TrainArgs
from nanochat.errors import UserError
from nanochat.scaling import GPTConfig, GroupPlan, Plan
from nanochat.schedule import Schedule

# What a resumed run may not change: these decide the weights and the data. World size, micro-batch, cadences,
# names and the machine are free. --extend lets the horizon through, with what follows from it.
FIXED_ARGS = ("corpus", "keep_tails", "document_mask", "seed", "soap_every", "soap_sides", "z_loss")
FIXED_PLAN = ("model", "batch_tokens", "lanes", "steps", "groups", "schedule")
HORIZON = ("steps", "schedule.", "groups.matrix.weight_decay")


def _flat(value: Any, name: str) -> dict[str, Any]:
    """Leaves of nested dictionaries by dotted name."""
    if not isinstance(value, dict):
        return {name: value}
    return {leaf: v for key, inner in value.items() for leaf, v in _flat(inner, f"{name}.{key}").items()}


def _filled(value: Any, cls: type[Any]) -> Any:
    """The fields of a dataclass as a file holds them; one that is newer than the file has its default."""
    if not isinstance(value, dict):
        return value
    known = {item.name: item.default for item in dataclasses.fields(cls)}
    return {name: default for name, default in known.items() if default is not dataclasses.MISSING} | value


def _fixed(plan: dict[str, Any], fingerprints: dict[str, str]) -> dict[str, Any]:
    """What may not change, by the name under which a difference is shown."""
    args = _filled(plan["args"], TrainArgs)
    groups = plan.get("groups")
    if isinstance(groups, dict):
        groups = {kind: _filled(group, GroupPlan) for kind, group in groups.items()}
    plan = plan | {
        "model": _filled(plan.get("model"), GPTConfig),
        "schedule": _filled(plan.get("schedule"), Schedule),
        "groups": groups,
    }
    out = {f"--{name.replace('_', '-')}": args.get(name) for name in FIXED_ARGS}
    for name in FIXED_PLAN:
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
    # Through JSON, where tuples become lists.
    then = json.loads(json.dumps(_fixed(meta["plan"], meta["fingerprints"])))
    now = json.loads(json.dumps(_fixed(plan.to_dict(), fingerprints)))
    absent = "nothing"
    changed = {
        name: f"{name}: {then.get(name, absent)!r} then, {now.get(name, absent)!r} now"
        for name in sorted(then.keys() | now.keys())
        if then.get(name, absent) != now.get(name, absent)
    }
    allowed = {name for name in changed if plan.args.extend and name.startswith(HORIZON)}
    if refused := [text for name, text in changed.items() if name not in allowed]:
        only_horizon = all(name.startswith(HORIZON) for name in changed)
        advice = (
            "Change the horizon with --extend, " if only_horizon else "Give the same arguments as before, "
        )
        raise UserError(
            f"{folder}: cannot be resumed, since these differ: {'; '.join(refused)}. "
            f"{advice}or start another run with --run."
        )
    return [changed[name] for name in sorted(allowed)]
