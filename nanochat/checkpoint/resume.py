"""Resuming: the checkpoint that a run goes on from, and the comparison that refuses another run's.

What decides the weights or the data may not change. The dtype and fp8 are of that kind; the attention
backend, torch.compile, recomputation and the number of ranks are not, although their sums are rounded in
another order: they are how a machine computes, and a run may go on on another machine.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from nanochat.checkpoint import format as checkpoint_format
from nanochat.checkpoint.compatibility import RETIRED_FLAGS, completed
from nanochat.common import files, run_files
from nanochat.common.errors import UserError
from nanochat.config.arguments import TrainArgs
from nanochat.config.plan import Plan
from nanochat.distributed.world import World

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


def starting_point(plan: Plan, world: World) -> Path | None:
    """The verified checkpoint to go on from; for a run started anew, proof that it overwrites nothing.

    The main rank looks and the others take its word, so that all begin at the same step.

    Returns:
        Its folder, or None to begin at step 0.

    Raises:
        UserError: what was asked for is not there or damaged, or the run exists without --resume.
    """
    newest, error = None, None
    try:
        newest = _look(plan.args, world) if world.is_main else None
    except UserError as refused:
        error = refused
    if world.any_rank(error is not None):
        raise error or UserError("the main rank cannot begin; it says why.")
    step = world.max_over_ranks(-1 if newest is None else int(newest.name.removeprefix("step_")))
    if step < 0:
        return None
    folder = checkpoint_format.folder_of(plan.args.run_name, step)
    if not folder.is_dir():
        raise UserError(
            f"{folder}: rank {world.rank} does not see it. All machines of a run need NANOCHAT_BASE_DIR on a "
            "disk that they share."
        )
    return folder


def _look(args: TrainArgs, world: World) -> Path | None:
    is_restarted = _is_same_launch(args, world)
    if args.resume not in ("", "auto") and not is_restarted:
        return checkpoint_format.find(args.run_name, int(args.resume))
    if args.resume or is_restarted:
        return checkpoint_format.find(args.run_name, None, say=world.print0)
    if present := checkpoint_format.steps_of(args.run_name):
        raise UserError(
            f"run {args.run_name!r} has checkpoints already (steps {', '.join(map(str, present))}). "
            "Go on with --resume=auto, name another with --run, or delete its folder."
        )
    return None


def _is_same_launch(args: TrainArgs, world: World) -> bool:
    """Whether torchrun has started this run before and only restarts its workers.

    A failure raises its count of restarts; a machine that comes or goes (--nnodes=MIN:MAX) does not, but the
    launch keeps its name, which config.json holds. "none" is what torchrun calls a launch without a name.
    """
    if world.restarts:
        return True
    path = files.run_dir(args.run_name) / "config.json"
    if world.launch in ("", "none") or not path.exists():
        return False
    try:
        machine = files.read_json(path, dict[str, Any]).get("machine")
    except UserError:  # whoever starts it says then what is wanted: --resume=auto, or another name
        return False
    return isinstance(machine, dict) and machine.get("launch") == world.launch


def leave_other_branches(run: str, step: int, say: Callable[[str], None]) -> None:
    """Put aside what a run has left of steps after `step`, where it goes on now. The main rank calls it.

    Checkpoints of those steps would pass for newer ones than those that are written from now on. Their curve
    is kept too, and so is that of a run that begins at step 0 although it has done steps before.
    """
    metrics = files.run_dir(run) / "metrics.jsonl"
    later = any(at > step for at in checkpoint_format.steps_of(run))
    if (later or step == 0) and (kept := run_files.keep_aside(metrics, step)):
        say(f"the metrics of the steps from {step} on are kept in {kept}")
    if moved := checkpoint_format.set_aside(run, step):
        say(
            f"set aside in {moved[0].parent}, for this run goes on from step {step}: "
            f"{', '.join(path.name for path in moved)}. Delete them when nobody needs them."
        )


def has_reached_target(plan: Plan, val_loss: float | None) -> bool:
    """Whether a validation is at or below --target-loss."""
    target = plan.args.target_loss
    return target is not None and val_loss is not None and val_loss <= target


def summary_of_finished(plan: Plan, step: int, world: World) -> dict[str, Any] | None:
    """What summary.json holds, if the run has come to its end and nothing was left undone. All ranks ask.

    The file follows from the run: where it is damaged, the checkpoint decides and it is written anew.
    """
    path = files.run_dir(plan.args.run_name) / "summary.json"
    summary: dict[str, Any] = {}
    try:
        summary = run_files.read_summary(plan.args.run_name) if path.exists() else {}
    except UserError as error:
        world.print0(f"passed over: {error}")
    if world.any_rank(not summary):
        return None
    status, steps = summary["status"], summary["steps"]
    ended = status == "finished" and steps == plan.steps <= step
    reached = status == "target_reached" and steps == step
    return summary if ended or (reached and has_reached_target(plan, summary.get("val_loss"))) else None


# ----------------------------------------------------------------------------------------------------
# whether a checkpoint is of the run that wants to go on from it


def fixed_fields(cls: type[Any], names: Iterable[str]) -> list[str]:
    """Those of the names that a resumed run may not change: all whose metadata does not say that it may.

    The guard is closed by default: a new flag or field is fixed, and so is one of a later version that this
    one does not know.
    """
    open_fields = {item.name for item in dataclasses.fields(cls) if "resume" in item.metadata}
    return sorted(set(names) - open_fields)


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Leaves of nested dictionaries by dotted name."""
    if not isinstance(value, dict):
        return {name.removeprefix("."): value}
    return {leaf: v for key, inner in value.items() for leaf, v in _flat(inner, f"{name}.{key}").items()}


def _fixed(plan: dict[str, Any], fingerprints: dict[str, str]) -> dict[str, Any]:
    """What may not change, by the name under which a difference is shown."""
    args, known = plan["args"], [item.name for item in dataclasses.fields(Plan) if item.name != "args"]
    return {
        **{f"--{name.replace('_', '-')}": args[name] for name in fixed_fields(TrainArgs, args)},
        **_flat({name: plan.get(name) for name in fixed_fields(Plan, known)}),
        **{f"{name} hash": value for name, value in fingerprints.items()},
    }


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
    if gone := [name for name in RETIRED_FLAGS if name in then]:
        return (
            f"This version has no --{gone[0].replace('_', '-')}: finish the run with the one that began it, "
        )
    in_plan = not any(name.startswith("--") or name.endswith(" hash") for name in changed)
    if in_plan and all(then.get(name) == now[name] for name in asked):
        return f"The recipe {now['recipe']!r} has changed since: put its constants back, "
    if HORIZON.issuperset(changed):
        return "Change the horizon with --extend, "
    return "Give the same arguments as before, "
