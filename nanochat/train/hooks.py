"""What happens between steps: save, validate, score, sample. Each knows its own cadence."""

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
    """Something done every so many steps, at the end, and perhaps at step 0.

    Attributes:
        action: what is done; it may read the state and set its validation figures.
        every: steps between two times; 0 means only at the end.
        at_start: also before the first step.
        also: asked on every rank between any two steps; it is time too where this says so.
    """

    action: Callable[[TrainState], None]
    every: int
    at_start: bool = False
    also: Callable[[], bool] = lambda: False

    def due(self, step: int, last: int) -> bool:
        """Whether it is time, when `step` of `last` steps are done."""
        if step == last:
            return True
        if step == 0:
            return self.at_start
        extra = self.also()
        return extra or (self.every > 0 and step % self.every == 0)


def default_hooks(
    plan: Plan,
    corpus: Corpus,
    tokenizer: Tokenizer,
    saver: Saver,
    world: World,
    log: RunLog,
    stop_requested: Callable[[], bool],
) -> list[Hook]:
    """The hooks of base_train. Saving comes first, so that nothing after it can lose the weights.

    Those that take long ask now and then whether to stop, and raise `Stopped` then.
    """
    args = plan.args
    hooks = []
    if args.check_ranks_every:  # before saving: what differs must not become a checkpoint
        hooks.append(Hook(_comparer(world), args.check_ranks_every))
    hooks += [
        Hook(saver.save, args.save_every, also=saver.is_time),
        Hook(_validator(plan, corpus, tokenizer, world, log, stop_requested), args.eval_every, at_start=True),
        Hook(_sampler(tokenizer, world, log), args.sample_every),
    ]
    if args.core_metric_every is not None:
        hooks.append(Hook(_scorer(plan, tokenizer, world, log, stop_requested), args.core_metric_every))
    return hooks


def _comparer(world: World) -> Callable[[TrainState], None]:
    def compare(state: TrainState) -> None:
        require_equal(dict(state.model.named_parameters()), world, state.step)

    return compare


def _validator(
    plan: Plan,
    corpus: Corpus,
    tokenizer: Tokenizer,
    world: World,
    log: RunLog,
    stop_requested: Callable[[], bool],
) -> Callable[[TrainState], None]:
    token_bytes = tokenizer.token_bytes()
    batches = ValBatches(
        corpus,
        tokenizer,
        sequence_len=plan.model.sequence_len,
        rows=plan.device_batch_size,
        world=world,
        max_tokens=plan.args.eval_tokens,
        keep_tails=bool(plan.args.keep_tails),
    )

    def validate(state: TrainState) -> None:
        found = evaluate(state.model, batches, token_bytes, world, stop_requested)
        state.val_bpb, state.val_loss = _finite(found.bpb), _finite(found.loss)
        if state.val_bpb is not None:
            lowest = state.val_bpb if state.min_val_bpb is None else state.min_val_bpb
            state.min_val_bpb = min(state.val_bpb, lowest)
        log.write(
            "eval",
            state.step,
            val_bpb=state.val_bpb,
            val_loss=state.val_loss,
            tokens=plan.tokens_until(state.step),
            train_seconds=state.train_seconds,
        )
        log.say(
            f"step {state.step:5d}/{plan.steps} | validation {found.bpb:.4f} bits per byte, "
            f"{found.loss:.4f} nats per token | {state.train_seconds:,.1f} s of training"
        )

    return validate


def _finite(value: float) -> float | None:
    """A figure as JSON can hold it: null where it is not finite."""
    return value if math.isfinite(value) else None


def _scorer(
    plan: Plan, tokenizer: Tokenizer, world: World, log: RunLog, stop_requested: Callable[[], bool]
) -> Callable[[TrainState], None]:
    bundle = core_evaluate.find_bundle(plan.args.eval_bundle)

    def score(state: TrainState) -> None:
        result = core_evaluate.evaluate(
            scoring.GPTScorer(state.model),
            tokenizer,
            bundle,
            max_per_task=plan.args.core_metric_max_per_task,
            world=world,
            stop_requested=stop_requested,
        )
        log.write("core", state.step, core_metric=result.core_metric, core_stderr=result.core_stderr)
        log.say(
            f"step {state.step:5d}/{plan.steps} | CORE {result.core_metric:.4f} +- {result.core_stderr:.4f}"
        )

    return score


def _sampler(tokenizer: Tokenizer, world: World, log: RunLog) -> Callable[[TrainState], None]:
    def sample(state: TrainState) -> None:
        if not world.is_main:
            return
        for text in sample_texts(state.model, tokenizer):
            log.write("sample", state.step, text=text)
            log.say(f"  {text!r}")

    return sample
