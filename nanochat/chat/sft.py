"""Supervised finetuning: a base model learns the replies of conversations, through the trainer of base_train.

The loss is the mean over the supervised tokens of the global batch, whatever the micro-batches and the ranks.
The number of steps is known at once, since every conversation is measured and packed before the first.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from nanochat.chat import corpus, evaluate, finetune, loader
from nanochat.chat.corpus import Mixture
from nanochat.chat.loader import ChatLoader
from nanochat.checkpoint import state as checkpoint_state
from nanochat.checkpoint.async_saver import Saver
from nanochat.checkpoint.state import Base, TrainState
from nanochat.common.stop_signals import requested
from nanochat.config.arguments import SftArgs
from nanochat.config.plan import Plan
from nanochat.distributed.world import World
from nanochat.evaluation import bits_per_byte
from nanochat.model.gpt import GPT
from nanochat.tokenizer.tokenizer import Tokenizer
from nanochat.train.hooks import Hook, record_validation, saving
from nanochat.train.run_log import RunLog


@dataclass(eq=False)
class Sft:
    """The stage of chat_sft: packed conversations, from the weights and moments of a base run."""

    args: SftArgs
    base: Base
    mixture: Mixture
    loader: ChatLoader

    @property
    def tokenizer(self) -> Tokenizer:
        """The base's tokenizer."""
        return self.base.tokenizer

    @property
    def fingerprints(self) -> dict[str, str]:
        """Hashes of the conversations and of the tokenizer."""
        return {"conversations": self.loader.fingerprint, "tokenizer": self.tokenizer.fingerprint}

    def make_loader(self, plan: Plan, model: GPT, world: World) -> ChatLoader:  # noqa: ARG002 - as Stage
        """The packed rows, in micro-batches of the plan."""
        self.loader.device_batch_size = plan.device_batch_size
        return self.loader

    def begin(self, state: TrainState, world: World) -> None:
        """Take the weights and moments of the base."""
        self.base.warm_start(state)
        world.print0(f"begins with step {self.base.step} of run {self.base.run}: weights and moments")

    def hooks(self, plan: Plan, saver: Saver, world: World, log: RunLog) -> list[Hook]:
        """Saving, validation on replies, and the evaluation of the tasks if it is asked for."""
        return [
            *saving(plan, saver, world),
            Hook(Validation(self, plan, world, log).run, self.args.eval_every, at_start=True),
            *evaluate.hooks(plan, self.args, self.tokenizer, world, log),
        ]


@dataclass(eq=False)
class Validation:
    """Bits per byte of the replies in the validation splits: of each source, and of all."""

    stage: Sft
    plan: Plan
    world: World
    log: RunLog

    @cached_property
    def batches(self) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """(inputs, targets) of each source; made once, at the first validation."""
        args = self.stage.args
        by_source = loader.validation(
            self.stage.mixture,
            self.stage.tokenizer,
            sequence_len=self.plan.model.sequence_len,
            rows=self.plan.device_batch_size,
            world=self.world,
            max_tokens=args.eval_tokens,
        )
        return {source: list(batches) for source, batches in by_source.items()}

    def run(self, state: TrainState) -> None:
        """Evaluate, and log a line a source and one of all."""
        token_bytes = self.stage.tokenizer.token_bytes()
        if state.step == 0:
            for source, counts in self.stage.loader.counts.items():
                told = ", ".join(f"{count:,} {name}" for name, count in counts.items())
                self.log.record("chat_data", 0, f"{source}: {told}", source=source, **counts)
        whole = bits_per_byte.Sums()
        for source, batches in self.batches.items():
            sums = bits_per_byte.add_up(state.model, batches, token_bytes, self.world, requested)
            whole += sums
            if len(self.batches) > 1:
                found = sums.validation()
                line = f"step {state.step:5d}/{self.plan.steps} | {source}: {found.bpb:.4f} bits per byte"
                self.log.record("chat_val", state.step, line, source=source, bpb=found.bpb, loss=found.loss)
        record_validation(self.plan, state, whole.validation(), self.log)


def prepare(args: SftArgs, world: World) -> tuple[Plan, Sft]:
    """The plan and the stage of a run of SFT.

    Raises:
        UserError: there is no such base, or a corpus is absent, of another kind, or has a conversation that
            cannot be used.
    """
    finetune.require_base(args, "chat_sft")
    base = checkpoint_state.read_base(args.base, args.base_step)
    length, mixture = base.model.sequence_len, corpus.mixture(args.data)
    batch_tokens = args.total_batch_size or base.batch_tokens
    rows = max(1, batch_tokens // length)
    conversations = ChatLoader(
        mixture,
        base.tokenizer,
        sequence_len=length,
        rows_per_batch=rows,
        seed=args.seed,
        world=world,
        device_batch_size=1,
    )
    steps = args.num_iterations or -(-conversations.rows_per_epoch // rows)
    plan = finetune.plan(
        "sft",
        args,
        base,
        world.size,
        batch_tokens=batch_tokens,
        steps=steps,
        warmdown_steps=round(args.warmdown_ratio * steps),
        group=lambda _, of_base: dataclasses.replace(
            of_base, lr=of_base.lr * args.init_lr_frac, weight_decay=0.0
        ),
        document_mask=args.document_mask,
    )
    return plan, Sft(args, base, mixture, conversations)
