"""Plan of a finetune: that of the base run, with a schedule, a batch and learning rates of its own.

SFT and RL share it, and the way from arguments to a report. Whatever is not said here is as the base was
trained: shape, optimizer, base rates.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any, TypeVar

from nanochat.checkpoint.state import Base
from nanochat.common.errors import UserError
from nanochat.config import plan as planning
from nanochat.config.arguments import FinetuneFlags, TrainArgs
from nanochat.config.plan import Finetune, GroupPlan, Plan
from nanochat.config.schedule import Schedule
from nanochat.distributed import world
from nanochat.distributed.world import World
from nanochat.train import run as train_run
from nanochat.train.stage import Stage

Flags = TypeVar("Flags", bound=FinetuneFlags)

MOMENTUM_START, MOMENTUM_PEAK, MOMENTUM_STEPS = 0.85, 0.95, 300  # of Muon: karpathy/nanochat's SFT


def plan(
    stage: str,
    args: FinetuneFlags,
    base: Base,
    world_size: int,
    *,
    batch_tokens: int,
    steps: int,
    warmdown_steps: int,
    group: Callable[[str, GroupPlan], GroupPlan],
    document_mask: bool,
) -> Plan:
    """The plan of a run that begins with another.

    Learning rates fall linearly to zero at the end.

    Args:
        stage: "sft" or "rl", also the end of the name of a run without one.
        args: what was asked.
        base: the run to begin with.
        world_size: number of ranks.
        batch_tokens: tokens of a global batch.
        steps: optimizer steps.
        warmdown_steps: of them, those in which the learning rate falls.
        group: how a kind of parameter is updated, from how the base updates it at its own batch.
        document_mask: attention within conversations.

    Raises:
        UserError: the ranks or the context do not divide the batch.
    """
    given = _arguments(stage, args, base, batch_tokens, steps, document_mask)
    own, of_base = (planning.plan(asked, base.model.vocab_size, world_size) for asked in (given, base.args))
    schedule = Schedule(
        steps=steps,
        warmup_steps=0,
        warmdown_steps=warmdown_steps,
        final_lr_frac=0.0,
        momentum_start=MOMENTUM_START,
        momentum_peak=MOMENTUM_PEAK,
        momentum_warmup_steps=MOMENTUM_STEPS,
        momentum_final=MOMENTUM_PEAK,
        matrix_weight_decay=0.0,
        weight_decay_shape="linear",
    )
    return dataclasses.replace(
        own,
        model=dataclasses.replace(base.model, document_mask=document_mask),
        batch_rows=batch_tokens // base.model.sequence_len,
        groups={kind: group(kind, updated) for kind, updated in of_base.groups.items()},
        schedule=schedule,
        finetune=Finetune(stage, base.run, base.step, base.sha256, _settings(args)),
    )


def run(args: Flags, prepare: Callable[[Flags, World], tuple[Plan, Stage]]) -> str:
    """Plan a finetune, train it and write its report; with --dry-run, print the plan alone.

    Args:
        args: of the command.
        prepare: gives the plan and the stage.

    Returns:
        The status of the run.
    """
    with world.join(args.device_type, args.dist_timeout) as ranks:
        planned, stage = prepare(args, ranks)
        if args.dry_run:
            ranks.print0(json.dumps(planned.to_dict(), indent=2))
            return "planned"
        precision = train_run.announce(planned, ranks)
        return train_run.conclude(train_run.run(planned, stage, precision, ranks), ranks)


def _arguments(
    stage: str, args: FinetuneFlags, base: Base, batch_tokens: int, steps: int, document_mask: bool
) -> TrainArgs:
    """The base's arguments, with all that were given now and what follows from them."""
    flags = {item.name for item in dataclasses.fields(TrainArgs)}
    given = {name: value for name, value in vars(args).items() if name in flags}
    return dataclasses.replace(
        base.args,
        **given
        | {"run": args.run or f"{base.run}-{stage}", "tokenizer": base.args.tokenizer_name}
        | {"total_batch_size": batch_tokens, "num_iterations": steps, "document_mask": document_mask}
        | {"fp8": False, "fp8_head": False, "target_flops": None, "target_loss": None}
        | {"profile": False, "extend": False},
    )


def _settings(args: FinetuneFlags) -> dict[str, Any]:
    """The flags that decide what is learned, without those that a plan has anyway."""
    elsewhere = {item.name for item in dataclasses.fields(TrainArgs)} | {"base", "base_step"}
    fields = [item for item in dataclasses.fields(args) if "resume" not in item.metadata]
    return {item.name: getattr(args, item.name) for item in fields if item.name not in elsewhere}


def require_base(args: FinetuneFlags, command: str) -> None:
    """Refuse arguments that name no run to begin with.

    Raises:
        UserError: shows a command that does.
    """
    if not args.base:
        raise UserError(
            f"--base is missing. Name the run to begin with: python -m scripts.{command} --base d12"
        )
