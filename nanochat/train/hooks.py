"""Hooks of the training loop, each at its cadence; those of pretraining: validation, samples, CORE, saving.

They run between steps, so that a step does nothing but train.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from nanochat.checkpoint.async_saver import Saver
from nanochat.checkpoint.state import TrainState
from nanochat.common.stop_signals import requested
from nanochat.config.plan import Plan
from nanochat.data.corpus import Corpus
from nanochat.distributed.weight_check import require_equal
from nanochat.distributed.world import World
from nanochat.engine import sample_texts
from nanochat.evaluation.bits_per_byte import Validation, batches_of, evaluate
from nanochat.evaluation.core import evaluate as core_evaluate
from nanochat.evaluation.core import scoring
from nanochat.tokenizer.tokenizer import Tokenizer
from nanochat.train.run_log import RunLog


@dataclass(frozen=True)
class Hook:
    """An action that runs every so many steps, at the end, and perhaps at step 0.

    Attributes:
        action: may read the state and set its validation figures.
        every: steps between two times; 0 means only at the end.
        at_start: also before the first step.
        also: called on every rank between any two steps; where it returns True, the hook is due too.
    """

    action: Callable[[TrainState], None]
    every: int
    at_start: bool = False
    also: Callable[[], bool] = lambda: False

    def due(self, step: int, last: int) -> bool:
        """Whether it is time, when `step` of `last` steps are done."""
        if step in (0, last):
            return self.at_start or step == last
        return self.also() or (self.every > 0 and step % self.every == 0)


def saving(plan: Plan, saver: Saver, world: World) -> list[Hook]:
    """The hooks of every stage: the comparison of ranks, if asked for, and saving.

    Ranks are compared before: those that differ must not become a checkpoint.
    """

    def compare_ranks(state: TrainState) -> None:
        require_equal(dict(state.model.named_parameters()), world, state.step)

    every = plan.args.check_ranks_every
    compare = [Hook(compare_ranks, every)] if every else []
    return [*compare, Hook(saver.save, plan.args.save_every, also=saver.is_time)]


def record_validation(plan: Plan, state: TrainState, found: Validation, log: RunLog) -> None:
    """Keep validation figures in the state, and log them; what is not finite is null, as JSON has no NaN."""
    state.val_bpb, state.val_loss = (
        value if math.isfinite(value) else None for value in (found.bpb, found.loss)
    )
    known = [bpb for bpb in (state.val_bpb, state.min_val_bpb) if bpb is not None]
    state.min_val_bpb = min(known, default=None)
    log.record(
        "eval",
        state.step,
        f"step {state.step:5d}/{plan.steps} | validation {found.bpb:.4f} bits per byte, "
        f"{found.loss:.4f} nats per token | {state.train_seconds:,.1f} s of training",
        val_bpb=state.val_bpb,
        val_loss=state.val_loss,
        tokens=plan.tokens_until(state.step),
        train_seconds=state.train_seconds,
    )


@dataclass(eq=False)
class PretrainingHooks:
    """The hooks of base_train.

    Saving comes before evaluation, which then cannot lose the weights. Evaluations look now and then
    whether a signal has come, and raise `Stopped` on all ranks if it has on any.
    """

    plan: Plan
    corpus: Corpus
    tokenizer: Tokenizer
    saver: Saver
    world: World
    log: RunLog

    def __post_init__(self) -> None:
        """Find the data of the evaluations: what is absent is missed now, and not hours later."""
        args = self.plan.args
        self.token_bytes = self.tokenizer.token_bytes()
        length, rows = self.plan.model.sequence_len, self.plan.device_batch_size
        self.batches = batches_of(
            self.corpus, self.tokenizer, args, length, rows, self.world, args.eval_tokens
        )
        if args.core_metric_every is not None:
            self.bundle = core_evaluate.find_bundle(args.eval_bundle)

    def all(self) -> list[Hook]:
        """The hooks in their order."""
        args = self.plan.args
        hooks = [
            *saving(self.plan, self.saver, self.world),
            Hook(self.validate, args.eval_every, at_start=True),
            Hook(self.sample, args.sample_every),
        ]
        if args.core_metric_every is not None:
            hooks.append(Hook(self.score, args.core_metric_every))
        return hooks

    def validate(self, state: TrainState) -> None:
        """Validation loss and bits per byte."""
        found = evaluate(state.model, self.batches, self.token_bytes, self.world, requested)
        record_validation(self.plan, state, found, self.log)

    def score(self, state: TrainState) -> None:
        """CORE, of a part of each task."""
        result = core_evaluate.evaluate(
            scoring.GPTScorer(state.model),
            self.tokenizer,
            self.bundle,
            max_per_task=self.plan.args.core_metric_max_per_task,
            world=self.world,
            stop_requested=requested,
        )
        core, stderr = result.core_metric, result.core_stderr
        line = f"step {state.step:5d}/{self.plan.steps} | CORE {core:.4f} +- {stderr:.4f}"
        self.log.record("core", state.step, line, core_metric=core, core_stderr=stderr)

    def sample(self, state: TrainState) -> None:
        """Texts that the model writes; every rank writes some of them."""
        for text in sample_texts(state.model, self.tokenizer, self.world):
            self.log.record("sample", state.step, f"  {text!r}", text=text)
