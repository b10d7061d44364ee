"""Plan of a finetune: that of the base run, with a schedule, a batch and learning rates of its own.

SFT and RL share it. Whatever is not said here is as the base was trained: shape, optimizer, base rates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from nanochat.checkpoint.state import Base
from nanochat.common.errors import UserError
from nanochat.config import plan as planning
from nanochat.config.arguments import FinetuneFlags, TrainArgs
from nanochat.config.plan import Finetune, Plan

MOMENTUM_START, MOMENTUM_PEAK, MOMENTUM_STEPS = 0.85, 0.95, 300  # of Muon: karpathy/nanochat's SFT
NOT_SETTINGS = ("base", "base_step")  # of the flags that decide what is learned: `Finetune` has them itself


def plan(
    stage: str,
    args: FinetuneFlags,
    base: Base,
    world_size: int,
    *,
    batch_tokens: int,
    steps: int,
    warmdown_steps: int,
    lr_frac: float,
    document_mask: bool,
) -> Plan:
    """The plan of a run that begins with another.

    Learning rates are those of the base for its own batch, times `lr_frac`. They fall linearly to zero at the
    end; weight decay is zero.

    Args:
        stage: "sft" or "rl", also the end of the name of a run without one.
        args: what was asked.
        base: the run to begin with.
        world_size: number of ranks.
        batch_tokens: tokens of a global batch.
        steps: optimizer steps.
        warmdown_steps: of them, those in which the learning rate falls.
        lr_frac: factor on the base's learning rates.
        document_mask: attention within conversations.

    Raises:
        UserError: the ranks or the context do not divide the batch.
    """
    shared = {item.name for item in dataclasses.fields(args)} & {
        item.name for item in dataclasses.fields(TrainArgs)
    }
    asked = {name: getattr(args, name) for name in shared}
    asked |= {"run": args.run or f"{base.run}-{stage}", "total_batch_size": batch_tokens}
    asked |= {"tokenizer": base.args.tokenizer_name, "num_iterations": steps, "document_mask": document_mask}
    asked |= {"fp8": False, "fp8_head": False, "target_flops": None, "target_loss": None}
    own = planning.plan(
        dataclasses.replace(base.args, **asked, profile=False, extend=False),
        base.model.vocab_size,
        world_size,
    )
    of_base = planning.plan(base.args, base.model.vocab_size, 1)
    groups = {
        kind: dataclasses.replace(group, lr=group.lr * lr_frac, weight_decay=0.0)
        for kind, group in of_base.groups.items()
    }
    schedule = dataclasses.replace(
        own.schedule,
        warmup_steps=0,
        warmdown_steps=warmdown_steps,
        final_lr_frac=0.0,
        momentum_start=MOMENTUM_START,
        momentum_peak=MOMENTUM_PEAK,
        momentum_warmup_steps=MOMENTUM_STEPS,
        momentum_final=MOMENTUM_PEAK,
        matrix_weight_decay=0.0,
        batch_stages=(),
        window_stages=(),
    )
    rows = batch_tokens // base.model.sequence_len
    return dataclasses.replace(
        own,
        model=dataclasses.replace(base.model, document_mask=document_mask),
        batch_rows=rows,
        groups=groups,
        schedule=schedule,
        finetune=Finetune(stage, base.run, base.step, base.sha256, settings_of(args, shared)),
    )


def settings_of(args: FinetuneFlags, shared: Iterable[str]) -> dict[str, Any]:
    """The flags of a stage that decide what is learned, and that the arguments of the plan do not have."""
    fields = [item for item in dataclasses.fields(args) if "resume" not in item.metadata]
    left_out = {*shared, *NOT_SETTINGS}
    return {item.name: getattr(args, item.name) for item in fields if item.name not in left_out}


def require_base(args: FinetuneFlags, command: str) -> None:
    """Refuse arguments that name no run to begin with.

    Raises:
        UserError: shows a command that does.
    """
    if not args.base:
        raise UserError(
            f"--base is missing. Name the run to begin with: python -m scripts.{command} --base d12"
        )
