"""Hooks of the training loop: comparing ranks, saving, validation, samples and CORE, each at its own cadence.

They run between steps, so that a step does nothing but train.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from nanochat.checkpoint.async_saver import Saver
from nanochat.checkpoint.state import TrainState
from nanochat.config.plan import Plan
from nanochat.data.corpus import Corpus
from nanochat.data.train_loader import ValBatches
from nanochat.distributed.weight_check import require_equal
from nanochat.distributed.world import World
from nanochat.engine import sample_texts
from nanochat.evaluation.bits_per_byte import evaluate
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


def default_hooks(
    plan: Plan,
    corpus: Corpus,
    tokenizer: Tokenizer,
    saver: Saver,
    world: World,
    log: RunLog,
    stop_requested: Callable[[], bool],
) -> list[Hook]:
    """The hooks of base_train. Saving comes before evaluation, which then cannot lose the weights.

    Evaluations call `stop_requested` now and then, and raise `Stopped` on all ranks if it is True on any.
    """
    args, evaluation = plan.args, Evaluation(plan, corpus, tokenizer, world, log, stop_requested)
    hooks = [
        Hook(saver.save, args.save_every, also=saver.is_time),
        Hook(evaluation.validate, args.eval_every, at_start=True),
        Hook(evaluation.sample, args.sample_every),
    ]
    if args.check_ranks_every:  # before saving: ranks that differ must not become a checkpoint
        hooks.insert(0, Hook(evaluation.compare_ranks, args.check_ranks_every))
    if args.core_metric_every is not None:
        hooks.append(Hook(evaluation.score, args.core_metric_every))
    return hooks


class Evaluation:
    """The actions that measure a model in training, and record what they find."""

    def __init__(
        self,
        plan: Plan,
        corpus: Corpus,
        tokenizer: Tokenizer,
        world: World,
        log: RunLog,
        stop_requested: Callable[[], bool],
    ) -> None:
        """Find the bundle of CORE now, if it is wanted: hours later is too late to miss it."""
        self.plan, self.tokenizer, self.world, self.log = plan, tokenizer, world, log
        self.stop_requested = stop_requested
        self.token_bytes = tokenizer.token_bytes()
        self.batches = ValBatches(
            corpus,
            tokenizer,
            sequence_len=plan.model.sequence_len,
            rows=plan.device_batch_size,
            world=world,
            max_tokens=plan.args.eval_tokens,
            keep_tails=bool(plan.args.keep_tails),
        )
        if plan.args.core_metric_every is not None:
            self.bundle = core_evaluate.find_bundle(plan.args.eval_bundle)

    def compare_ranks(self, state: TrainState) -> None:
        """End the run if the weights of two ranks differ."""
        require_equal(dict(state.model.named_parameters()), self.world, state.step)

    def validate(self, state: TrainState) -> None:
        """Validation loss and bits per byte; a figure that is not finite is null, as JSON has no NaN."""
        found = evaluate(state.model, self.batches, self.token_bytes, self.world, self.stop_requested)
        state.val_bpb, state.val_loss = (
            value if math.isfinite(value) else None for value in (found.bpb, found.loss)
        )
        known = [bpb for bpb in (state.val_bpb, state.min_val_bpb) if bpb is not None]
        state.min_val_bpb = min(known, default=None)
        self._record(
            "eval",
            state,
            f"validation {found.bpb:.4f} bits per byte, {found.loss:.4f} nats per token | "
            f"{state.train_seconds:,.1f} s of training",
            val_bpb=state.val_bpb,
            val_loss=state.val_loss,
            tokens=self.plan.tokens_until(state.step),
            train_seconds=state.train_seconds,
        )

    def score(self, state: TrainState) -> None:
        """CORE, of a part of each task."""
        result = core_evaluate.evaluate(
            scoring.GPTScorer(state.model),
            self.tokenizer,
            self.bundle,
            max_per_task=self.plan.args.core_metric_max_per_task,
            world=self.world,
            stop_requested=self.stop_requested,
        )
        core, stderr = result.core_metric, result.core_stderr
        self._record("core", state, f"CORE {core:.4f} +- {stderr:.4f}", core_metric=core, core_stderr=stderr)

    def sample(self, state: TrainState) -> None:
        """Texts that the model writes; the main rank does this alone."""
        for text in sample_texts(state.model, self.tokenizer) if self.world.is_main else ():
            self.log.write("sample", state.step, text=text)
            self.log.say(f"  {text!r}")

    def _record(self, kind: str, state: TrainState, line: str, **values: float | None) -> None:
        self.log.write(kind, state.step, **values)
        self.log.say(f"step {state.step:5d}/{self.plan.steps} | {line}")
