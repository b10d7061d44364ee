"""From what a step measured to what a person reads: loss, speed, share of the peak, time left."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanochat.checkpoint.format import first_not_finite
from nanochat.checkpoint.state import TrainState
from nanochat.common import machine
from nanochat.common.errors import UserError
from nanochat.config.plan import Plan
from nanochat.distributed.world import World
from nanochat.optim.muon_adamw import UpdateResult
from nanochat.train.run_log import RunLog

SMOOTHING = 0.9  # of the training loss that the console shows
MOST_SKIPPED = 10  # steps in a row, after which no later one will do better


@dataclass(frozen=True)
class StepResult:
    """What a step measured, still on the device: reading it waits for the device.

    Attributes:
        loss: 0-dim, mean over the ranks, in nats.
        update: what the optimizer says of its step.
        overflow: 0-dim bool, it was held back because fp16 gradients overflowed, which the loss scale mends.
        lr_mult: the schedule's factor on every learning rate.
    """

    loss: Tensor
    update: UpdateResult
    overflow: Tensor
    lr_mult: float

    def on_device(self) -> Tensor:
        """(4 + P,) fp32: loss, gradient norm, applied, overflow, squares of the update by parameter."""
        update = self.update
        figures = (self.loss, update.grad_norm, update.applied.float(), self.overflow.float())
        return torch.cat((torch.stack(figures), update.update_squares))


class StepReporter:
    """Turns results on the device into lines, several steps at a time: a step never waits for a print."""

    def __init__(self, plan: Plan, world: World, log: RunLog, speed: machine.Speed) -> None:
        """`speed` is one device's, for the share of it that is used (MFU)."""
        self._plan, self._world, self._log = plan, world, log
        self._speed = speed
        self._tokens = 0
        self._pending: list[tuple[StepResult, float]] = []
        self._skipped_in_a_row = 0
        self._untimed_steps = 0
        self._mark = time.perf_counter()
        self.every = 10 if world.device.type == "cuda" else 1
        self.seconds_to_first_step: float | None = None

    def shares(self, tokens_per_s: float) -> dict[str, float]:
        """Model FLOPs as a share of the devices' peak, and of what they multiply matrices at."""
        flops_per_s = tokens_per_s * self._plan.flops_per_token / self._world.size
        return {
            "mfu": flops_per_s / self._speed.peak_flops,
            "mfu_measured": flops_per_s / self._speed.matmul_flops,
        }

    def tokens_per_second_overall(self) -> float | None:
        """Tokens of the steps over the age of this process: start, evaluation and saving included."""
        age = machine.process_age_seconds()
        return None if age is None else self._tokens / age

    def restart_clock(self) -> None:
        """Leave out what happened since the last step: evaluation, saving, samples."""
        self._mark = time.perf_counter()

    def add(self, state: TrainState, result: StepResult) -> None:
        """Take a step's result; `state.step` counts it already."""
        self._pending.append((result, state.loader.epoch))
        if len(self._pending) >= self.every or self.seconds_to_first_step is None:
            self.flush(state)

    def flush(self, state: TrainState) -> None:
        """Read the pending results, waiting for the device once, and report them.

        Raises:
            UserError: a loss or gradient was not finite, which left the weights as they were, and we are to
                stop there; or too many steps in a row were like that.
        """
        if not self._pending:
            return
        values = torch.stack([result.on_device() for result, _ in self._pending]).tolist()
        seconds = (time.perf_counter() - self._mark) / len(values)
        compiles = self.seconds_to_first_step is None and state.model.is_compiled
        if self.seconds_to_first_step is None:
            self.seconds_to_first_step = machine.process_age_seconds()
            if self.seconds_to_first_step is not None:
                self._log.say(f"first step {self.seconds_to_first_step:.1f} s after the start")
        first = state.step - len(values)
        for step, (loss, grad_norm, applied, overflow, *squares) in enumerate(values, start=first):
            result, epoch = self._pending[step - first]
            if compiles:  # that is not training: this step counts as long as the next
                self._untimed_steps = 1
            else:
                state.train_seconds += seconds * (1 + self._untimed_steps)
                self._untimed_steps = 0
            self._tokens += self._plan.tokens_at(step)
            if overflow:
                self._log.say(f"step {step}: fp16 gradients overflowed; step skipped, loss scale halved")
            elif not applied:
                self._held_back(state, step, loss, grad_norm, result.update)
                continue
            self._skipped_in_a_row = 0
            state.smoothed_loss += (1 - SMOOTHING) * (loss - state.smoothed_loss)
            norm = None if overflow else grad_norm
            figures = {"loss": loss, "grad_norm": norm, "lr_mult": result.lr_mult, "epoch": epoch}
            self._report(state, step, seconds, figures, state.optimizer.rms_by_kind(squares))
        self._pending.clear()
        self.restart_clock()

    def _held_back(
        self, state: TrainState, step: int, loss: float, grad_norm: float, update: UpdateResult
    ) -> None:
        """Say which step changed nothing and why; stop, or count it."""
        what = f"step {step}: loss {loss}, gradient norm {grad_norm}: not finite ({_origin(state, update)})"
        advice = "If it comes again, start another run with a lower --matrix-lr and --embedding-lr."
        if (broken := first_not_finite(dict(state.model.named_parameters()))) is not None:
            raise UserError(f"{what}, for {broken} is not finite since an update before it. {advice}")
        if self._plan.args.on_nonfinite == "stop":
            raise UserError(
                f"{what}, so the weights were left as they were. --resume=auto --on-nonfinite=skip goes on "
                f"from the last checkpoint and leaves such steps out. {advice}"
            )
        state.skipped_steps += 1
        self._skipped_in_a_row += 1
        self._log.write("skip", step, reason=what)
        self._log.say(f"{what}; skipped, {state.skipped_steps} so far")
        if self._skipped_in_a_row == MOST_SKIPPED:
            raise UserError(f"{what}, as were the {MOST_SKIPPED - 1} steps before it. {advice}")

    def _report(
        self,
        state: TrainState,
        step: int,
        seconds: float,
        figures: dict[str, Any],
        update_rms: dict[str, float],
    ) -> None:
        plan = self._plan
        smoothed = state.smoothed_loss / (1 - SMOOTHING ** (step + 1 - state.skipped_steps))
        tokens, tokens_per_s = plan.tokens_until(step + 1), plan.tokens_at(step) / seconds
        shares = self.shares(tokens_per_s)
        left_s = (plan.tokens - tokens) * state.train_seconds / tokens
        lr = plan.groups["matrix"].lr * figures["lr_mult"]
        skipped = f" | skipped {state.skipped_steps}" if state.skipped_steps else ""
        self._log.step(
            step,
            f"step {step + 1:5d}/{plan.steps} | loss {smoothed:.4f} | lr {lr:.2e} | "
            f"{tokens_per_s:,.0f} tok/s | mfu {100 * shares['mfu']:.1f}% "
            f"({100 * shares['mfu_measured']:.1f}% of a matmul) | epoch {figures['epoch']:.2f} | "
            f"eta {left_s / 60:.1f} min{skipped}",
            **figures,
            smoothed_loss=smoothed,
            lr=lr,
            tokens_per_second=tokens_per_s,
            **shares,
            tokens=tokens,
            train_seconds=state.train_seconds,
            skipped_steps=state.skipped_steps,
            **{f"update_rms_{kind}": rms for kind, rms in update_rms.items()},
        )


def _origin(state: TrainState, update: UpdateResult) -> str:
    """Where a number that is not finite was met: ranks by their loss, the first parameter by its gradient."""
    ranks = [str(rank) for rank, bad in enumerate(update.not_ok.tolist()) if bad]
    places = [f"in the loss of rank {', '.join(ranks)}"] if ranks else []
    squares = zip(state.optimizer.names, update.grad_squares.tolist(), strict=True)
    if first := next((name for name, square in squares if not math.isfinite(square)), None):
        places.append(f"first in the gradient of {first}")
    return ", ".join(places) or "the sum of the gradient's squares overflows"


def summarize(
    plan: Plan, state: TrainState, reporter: StepReporter, world: World, status: str
) -> dict[str, Any]:
    """The fields of summary.json: the end of training, for programs."""
    tokens = plan.tokens_until(state.step)
    tokens_per_s = tokens / state.train_seconds if state.train_seconds else 0.0
    return {
        "run": plan.args.run_name,
        "status": status,
        "depth": plan.args.depth,
        "steps": state.step,
        "skipped_steps": state.skipped_steps,
        "tokens": tokens,
        "val_bpb": state.val_bpb,
        "min_val_bpb": state.min_val_bpb,
        "val_loss": state.val_loss,
        "target_loss": plan.args.target_loss,
        "train_seconds": state.train_seconds,
        "tokens_per_second": tokens_per_s,
        "seconds_to_first_step": reporter.seconds_to_first_step,
        "peak_memory_bytes": machine.peak_memory_bytes(world.device),
        "tokens_per_second_overall": reporter.tokens_per_second_overall(),
        **reporter.shares(tokens_per_s),
        "world_size": world.size,
    }
