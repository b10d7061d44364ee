"""Where a run begins: anew, or at the checkpoint that --resume or a restarted launch asks for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanochat.checkpoint import format as checkpoint_format
from nanochat.common import files, run_files
from nanochat.common.errors import UserError
from nanochat.config.arguments import TrainArgs
from nanochat.config.plan import Plan
from nanochat.distributed.world import World


def starting_point(plan: Plan, world: World) -> Path | None:
    """The verified checkpoint to go on from; for a run started anew, proof that it overwrites nothing.

    The main rank looks and the others take its word, so that all begin at the same step.

    Returns:
        Its folder, or None to begin at step 0.

    Raises:
        UserError: what was asked for is not there or damaged, or the run exists without --resume.
    """
    found, error = None, None
    if world.is_main:
        try:
            found = _look(plan.args, world)
        except UserError as refused:
            error = refused
    if world.any_rank(error is not None):
        raise error or UserError("the main rank cannot begin; it says why.")
    step = world.max_over_ranks(-1 if found is None else int(found.name.removeprefix("step_")))
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
    if args.resume and args.resume != "auto" and not _is_step(args.resume):
        raise UserError(f"--resume={args.resume}: expected auto or the step of a checkpoint.")
    if _is_step(args.resume) and not _is_same_launch(args, world):
        return checkpoint_format.find(args.run_name, int(args.resume))
    if args.resume or _is_same_launch(args, world):
        return checkpoint_format.find(args.run_name, None, say=world.print0)
    if present := checkpoint_format.steps_of(args.run_name):
        raise UserError(
            f"run {args.run_name!r} has checkpoints already (steps {', '.join(map(str, present))}). "
            "Go on with --resume=auto, name another with --run, or delete its folder."
        )
    return None


def _is_step(resume: str) -> bool:
    return resume.isascii() and resume.isdecimal()


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
    later = [at for at in checkpoint_format.steps_of(run) if at > step]
    if later or step == 0:
        kept = run_files.keep_aside(metrics, step)
        if kept is not None:
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
    if not world.any_rank(world.is_main and path.exists()):
        return None
    summary: dict[str, Any] = {}
    try:
        summary = run_files.read_summary(plan.args.run_name)
    except UserError as error:
        world.print0(f"passed over: {error}")
    if world.any_rank(not summary):
        return None
    status, steps = summary["status"], summary["steps"]
    ended = status == "finished" and steps == plan.steps <= step
    reached = status == "target_reached" and steps == step
    return summary if ended or (reached and has_reached_target(plan, summary.get("val_loss"))) else None
