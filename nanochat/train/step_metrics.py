"""Metrics of the training steps: loss, speed, fraction of the peak (MFU), time left, steps held back.

Results stay on the device for several steps, since reading one waits for the device.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanochat.checkpoint.format import first_not_finite
from nanochat.checkpoint.state import COUNTERS, TrainState
from nanochat.common import machine
from nanochat.common.errors import UserError
from nanochat.config.plan import Plan
from nanochat.distributed.world import World
from nanochat.optim.muon_adamw import UpdateResult
from nanochat.train.run_log import RunLog

SHOWN = ("epoch", "reward")  # of what the loader says, on the console
SMOOTHING = 0.9  # of the training loss that the console shows
MOST_SKIPPED = 10  # steps in a row, after which no later one will do better


@dataclass(frozen=True)
class StepResult:
    """The result of a step, still on the device.

    Attributes:
        loss: 0-dim, mean over the ranks, in nats.
        update: what the optimizer reports.
        overflow: 0-dim bool, the update was held back because fp16 gradients overflowed; the loss scale has
            been halved.
        lr: learning rate of the matrices.
        data: what the loader says of the batch, by name: "epoch", or "reward" and others.
    """

    loss: Tensor
    update: UpdateResult
    overflow: Tensor
    lr: float
    data: dict[str, float]

    def on_device(self) -> Tensor:
        """(4 + P,) fp32: loss, gradient norm, applied, overflow, squares of the update by parameter."""
        update = self.update
        figures = (self.loss, update.grad_norm, update.applied.float(), self.overflow.float())
        return torch.cat((torch.stack(figures), update.update_squares))


class StepReporter:
    """Turns results on the device into lines, several steps at a time: a step never waits for a print."""

    def __init__(self, plan: Plan, world: World, log: RunLog, speed: machine.Speed) -> None:
        """`speed` is that of one device, of which the MFU is a fraction."""
        self._plan, self._world, self._log, self._speed = plan, world, log, speed
        self._peak_tokens_per_s = world.size * speed.peak_flops / plan.flops_per_token
        self._pending: list[StepResult] = []
        self._skipped_in_a_row = 0
        self._untimed_steps = 0
        self._mark = time.perf_counter()
        self.every = 10 if world.device.type == "cuda" else 1
        self.seconds_to_first_step: float | None = None

    def restart_clock(self) -> None:
        """Leave out the time since the last step: evaluation, saving, samples."""
        self._mark = time.perf_counter()

    def add(self, state: TrainState, result: StepResult) -> None:
        """Take a step's result; `state.step` counts it already."""
        self._pending.append(result)
        if len(self._pending) >= self.every or self.seconds_to_first_step is None:
            self.flush(state)

    def flush(self, state: TrainState) -> None:
        """Read the pending results, waiting for the device once, and report them.

        Raises:
            UserError: a loss or gradient was not finite, which left the weights as they were, and
                --on-nonfinite is stop; or too many steps in a row were like that.
        """
        if not self._pending:
            return
        values = torch.stack([result.on_device() for result in self._pending]).tolist()
        seconds = (time.perf_counter() - self._mark) / len(values)
        compiles = self.seconds_to_first_step is None and state.model.is_compiled
        if self.seconds_to_first_step is None:
            self.seconds_to_first_step = machine.process_age_seconds()
            if self.seconds_to_first_step is not None:
                self._log.say(f"first step {self.seconds_to_first_step:.1f} s after the start")
        first = state.step - len(values)
        for step, (result, numbers) in enumerate(zip(self._pending, values, strict=True), start=first):
            loss, _, applied, overflow, *_ = numbers
            self._untimed_steps += 1
            if not compiles:  # that is not training: such a step counts as long as the next
                state.train_seconds += seconds * self._untimed_steps
                self._untimed_steps = 0
            if not applied and not overflow:
                self._held_back(state, step, result, numbers)
                continue
            self._skipped_in_a_row = 0
            state.smoothed_loss += (1 - SMOOTHING) * (loss - state.smoothed_loss)
            self._report(state, step, seconds, result, numbers)
        self._pending.clear()
        self.restart_clock()

    def _held_back(self, state: TrainState, step: int, result: StepResult, numbers: list[float]) -> None:
        """Stop because of a step that changed nothing, or count it; print which, and where it went wrong."""
        update = result.update
        ranks = [f"in the loss of rank {rank}" for rank, bad in enumerate(update.not_ok.tolist()) if bad]
        squares = zip(state.optimizer.names, update.grad_squares.tolist(), strict=True)
        grads = [f"first in the gradient of {name}" for name, square in squares if not math.isfinite(square)]
        where = ", ".join(ranks + grads[:1]) or "the sum of the gradient's squares overflows"
        what = f"step {step}: loss {numbers[0]}, gradient norm {numbers[1]}: not finite ({where})"
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
        self._log.record("skip", step, f"{what}; skipped, {state.skipped_steps} so far", reason=what)
        if self._skipped_in_a_row == MOST_SKIPPED:
            raise UserError(f"{what}, as were the {MOST_SKIPPED - 1} steps before it. {advice}")

    def _report(
        self, state: TrainState, step: int, seconds: float, result: StepResult, numbers: list[float]
    ) -> None:
        """Write and print a step."""
        loss, grad_norm, _, overflow, *squares = numbers
        if overflow:
            self._log.say(f"step {step}: fp16 gradients overflowed; step skipped, loss scale halved")
        plan, tokens = self._plan, self._plan.tokens_until(step + 1)
        smoothed = state.smoothed_loss / (1 - SMOOTHING ** (step + 1 - state.skipped_steps))
        tokens_per_s = plan.tokens_at(step) / seconds
        mfu = tokens_per_s / self._peak_tokens_per_s
        of_matmul = mfu * self._speed.peak_flops / self._speed.matmul_flops
        left_s = (plan.tokens - tokens) * state.train_seconds / tokens
        told = " | ".join(f"{name} {result.data[name]:.2f}" for name in SHOWN if name in result.data)
        skipped = f" | skipped {state.skipped_steps}" if state.skipped_steps else ""
        self._log.record(
            "step",
            step,
            f"step {step + 1:5d}/{plan.steps} | loss {smoothed:.4f} | lr {result.lr:.2e} | "
            f"{tokens_per_s:,.0f} tok/s | mfu {100 * mfu:.1f}% ({100 * of_matmul:.1f}% of a matmul) | "
            f"{told} | eta {left_s / 60:.1f} min{skipped}",
            loss=loss,
            grad_norm=None if overflow else grad_norm,
            smoothed_loss=smoothed,
            lr=result.lr,
            tokens_per_second=tokens_per_s,
            mfu=mfu,
            tokens=tokens,
            train_seconds=state.train_seconds,
            skipped_steps=state.skipped_steps,
            **result.data,
            **{f"update_rms_{kind}": rms for kind, rms in state.optimizer.rms_by_kind(squares).items()},
        )

    def summary(self, state: TrainState, status: str) -> dict[str, Any]:
        """The fields of summary.json: the end of training, for programs."""
        plan, tokens = self._plan, self._plan.tokens_until(state.step)
        tokens_per_s = tokens / state.train_seconds if state.train_seconds else 0.0
        return {
            "run": plan.args.run_name,
            "status": status,
            "depth": plan.args.depth,
            "steps": state.step,
            "tokens": tokens,
            **{name: getattr(state, name) for name in COUNTERS if name != "step"},
            "target_loss": plan.args.target_loss,
            "tokens_per_second": tokens_per_s,
            "mfu": tokens_per_s / self._peak_tokens_per_s,
            "seconds_to_first_step": self.seconds_to_first_step,
            "peak_memory_bytes": machine.peak_memory_bytes(self._world.device),
            "world_size": self._world.size,
        }
