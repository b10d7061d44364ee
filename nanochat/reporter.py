"""From what a step measured to what a person reads: loss, speed, share of the peak, time left."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanochat import hardware
from nanochat.checkpoint import TrainState
from nanochat.errors import UserError
from nanochat.runlog import RunLog
from nanochat.scaling import Plan
from nanochat.world import World

SMOOTHING = 0.9  # of the training loss that the console shows


@dataclass(frozen=True)
class StepResult:
    """What a step measured, still on the device: reading it waits for the device.

    Attributes:
        loss: 0-dim, mean over the ranks, in nats.
        grad_norm: 0-dim, of the gradient averaged over the ranks.
        applied: 0-dim bool, False if the update was held back.
        overflow: 0-dim bool, it was held back because fp16 gradients overflowed, which the loss scale mends.
        lr_mult: the schedule's factor on every learning rate.
    """

    loss: Tensor
    grad_norm: Tensor
    applied: Tensor
    overflow: Tensor
    lr_mult: float

    def on_device(self) -> Tensor:
        """(4,) fp32: loss, gradient norm, applied, overflow."""
        return torch.stack((self.loss, self.grad_norm, self.applied.float(), self.overflow.float()))


class StepReporter:
    """Turns results on the device into lines, several steps at a time: a step never waits for a print."""

    def __init__(self, plan: Plan, world: World, log: RunLog, peak_flops_per_s: float) -> None:
        """`peak_flops_per_s` is one device's peak, for the share of it that is used (MFU)."""
        self._plan, self._world, self._log = plan, world, log
        self.peak_flops_per_s = peak_flops_per_s * world.size
        self._pending: list[tuple[StepResult, float]] = []
        self._mark = time.perf_counter()
        self.every = 10 if world.device.type == "cuda" else 1
        self.seconds_to_first_step: float | None = None

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
            UserError: a loss or gradient was not finite; the weights are those of the step before it.
        """
        if not self._pending:
            return
        values = torch.stack([result.on_device() for result, _ in self._pending]).tolist()
        seconds = (time.perf_counter() - self._mark) / len(values)
        if self.seconds_to_first_step is None:
            self.seconds_to_first_step = hardware.process_age_seconds()
        first = state.step - len(values)
        for step, (loss, grad_norm, applied, overflow) in enumerate(values, start=first):
            if overflow:
                self._log.say(f"step {step}: fp16 gradients overflowed; step skipped, loss scale halved")
            elif not applied:
                raise UserError(
                    f"step {step}: loss {loss}, gradient norm {grad_norm}: not finite, so the weights were "
                    "left as they were. Lower --matrix-lr and --embedding-lr; --resume=auto goes on from the "
                    "last checkpoint."
                )
            result, epoch = self._pending[step - first]
            state.train_seconds += seconds
            state.smoothed_loss += (1 - SMOOTHING) * (loss - state.smoothed_loss)
            norm = None if overflow else grad_norm
            figures = {"loss": loss, "grad_norm": norm, "lr_mult": result.lr_mult, "epoch": epoch}
            self._report(state, step, seconds, **figures)
        self._pending.clear()
        self.restart_clock()

    def _report(
        self,
        state: TrainState,
        step: int,
        seconds: float,
        *,
        loss: float,
        grad_norm: float | None,
        lr_mult: float,
        epoch: float,
    ) -> None:
        plan = self._plan
        smoothed = state.smoothed_loss / (1 - SMOOTHING ** (step + 1))
        tokens_per_s = plan.batch_tokens / seconds
        mfu = tokens_per_s * plan.flops_per_token / self.peak_flops_per_s
        left_s = (plan.steps - step - 1) * state.train_seconds / (step + 1)
        lr = plan.groups["matrix"].lr * lr_mult
        self._log.step(
            step,
            f"step {step + 1:5d}/{plan.steps} | loss {smoothed:.4f} | lr {lr:.2e} | "
            f"{tokens_per_s:,.0f} tok/s | mfu {100 * mfu:.1f}% | epoch {epoch:.2f} | "
            f"eta {left_s / 60:.1f} min",
            loss=loss,
            smoothed_loss=smoothed,
            lr=lr,
            lr_mult=lr_mult,
            grad_norm=grad_norm,
            tokens_per_second=tokens_per_s,
            mfu=mfu,
            epoch=epoch,
            tokens=(step + 1) * plan.batch_tokens,
            train_seconds=state.train_seconds,
        )


def summarize(
    plan: Plan, state: TrainState, reporter: StepReporter, world: World, status: str
) -> dict[str, Any]:
    """The fields of summary.json: the end of training, for programs."""
    tokens = state.step * plan.batch_tokens
    tokens_per_s = tokens / state.train_seconds if state.train_seconds else 0.0
    return {
        "run": plan.args.run_name,
        "status": status,
        "depth": plan.args.depth,
        "steps": state.step,
        "tokens": tokens,
        "val_bpb": state.val_bpb,
        "min_val_bpb": state.min_val_bpb,
        "train_seconds": state.train_seconds,
        "tokens_per_second": tokens_per_s,
        "seconds_to_first_step": reporter.seconds_to_first_step,
        "peak_memory_bytes": hardware.peak_memory_bytes(world.device),
        "mfu": tokens_per_s * plan.flops_per_token / reporter.peak_flops_per_s,
        "world_size": world.size,
    }
