"""The trainer: one step, the loop of steps, and a run from its first file to its last.

The step is one function and the loop another, so that what training computes can be read on one page.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nanochat import report
from nanochat.checkpoint import resume
from nanochat.checkpoint import state as checkpoint_state
from nanochat.checkpoint.async_saver import Saver
from nanochat.checkpoint.state import TrainState
from nanochat.common import files, locks, machine
from nanochat.common.errors import UserError, warn
from nanochat.common.stop_signals import Stopped, keep_work, requested, stop_signals
from nanochat.config import plan as planning
from nanochat.config.plan import Plan
from nanochat.config.schedule import lr_multiplier, muon_momentum, muon_weight_decay
from nanochat.data.train_loader import Batch
from nanochat.distributed.watchdog import Watchdog
from nanochat.distributed.world import World
from nanochat.model import attention_backends
from nanochat.model.gpt import GPT
from nanochat.optim.loss_scale import LossScale
from nanochat.optim.muon_adamw import MuonAdamW
from nanochat.optim.rates import MatrixOptions
from nanochat.train import memory
from nanochat.train.hooks import Hook
from nanochat.train.profiling import collector_held, traced
from nanochat.train.run_log import RunLog
from nanochat.train.stage import Stage
from nanochat.train.step_metrics import StepReporter, StepResult


def create_state(plan: Plan, stage: Stage, precision: machine.Precision, world: World) -> TrainState:
    """A run at step 0: initial weights from the seed, empty moments, the beginning of the data."""
    with torch.device("meta"):
        model = GPT(plan.model, precision, stage.tokenizer.bos_id if plan.model.document_mask else None)
    model.to_empty(device=world.device)
    model.init_weights(plan.args.seed)
    model.isolates_documents = plan.finetune is not None
    model.recompute = plan.args.recompute
    optimizer = MuonAdamW(
        dict(model.named_parameters()),
        model.parameter_kinds(),
        plan.groups,
        world,
        precision.compute_dtype,
        MatrixOptions(plan.polar_norm_factor, plan.args.soap_every, plan.args.soap_sides),
        getattr(torch, plan.args.grad_reduce_dtype),
    )
    loader = stage.make_loader(plan, model, world)
    return TrainState(0, model, optimizer, loader, LossScale(precision.compute_dtype, world.device))


def micro_batch_loss(model: GPT, batch: Batch, micro_batches: int) -> Tensor:
    """The part of a micro-batch in this rank's loss of a step: a 0-dim tensor in nats.

    Without weights every micro-batch has as many targets: the mean of their means is the mean of all.
    """
    if batch.weights is None:
        return model.loss(batch.inputs, batch.targets) / micro_batches
    return model.loss(batch.inputs, batch.targets, weights=batch.weights)


def train_step(plan: Plan, state: TrainState, world: World) -> StepResult:
    """Forward and backward over the micro-batches of this rank, then one update. Waits for nothing.

    A loss or gradient that is not finite, on any rank, never reaches the weights.
    """
    micro_batches = [batch for _ in range(plan.units_at(state.step)) for batch in state.loader.next_batch()]

    def passes(micro_batches: list[Batch]) -> Tensor:
        loss = torch.zeros((), device=world.device)
        for i, batch in enumerate(micro_batches, 1):
            is_last = i == len(micro_batches)
            state.model.hold_gradients(not is_last)
            micro_loss = micro_batch_loss(state.model, batch, len(micro_batches))
            with state.optimizer.reductions.early() if is_last else contextlib.nullcontext():
                state.loss_scale.up(micro_loss).backward()  # type: ignore[no-untyped-call]
            loss += micro_loss.detach()
        return loss

    loss = memory.halve_until_it_fits(passes, micro_batches, state, world)
    state.loss_scale.down(state.model.parameters())
    lr_mult = lr_multiplier(state.step, plan.schedule)
    update = state.optimizer.step(
        lr_mult,
        muon_momentum(state.step, plan.schedule),
        muon_weight_decay(state.step, plan.schedule),
        ok=torch.isfinite(loss),
        index=state.step,
    )
    mean_loss = world.all_reduce_sum(loss) / world.size
    overflow = state.loss_scale.adjust(update.applied, mean_loss)
    return StepResult(mean_loss, update, overflow, plan.groups["matrix"].lr * lr_mult, state.loader.metrics)


def train(plan: Plan, state: TrainState, world: World, reporter: StepReporter, hooks: list[Hook]) -> str:
    """Step until the plan's end, or until a signal on any rank stops all of them at the same step.

    Hooks run between steps, in their order. A run that goes on from a checkpoint runs again those that are
    due at its step, so that its metrics are those of a run that never stopped.

    Returns:
        "finished", "stopped", or "target_reached" where a validation is at or below --target-loss.
    """
    trace = files.run_dir(plan.args.run_name) / "trace.json" if plan.args.profile and world.is_main else None
    with collector_held(), traced(trace) as step_traced, contextlib.suppress(Stopped):
        while True:
            state.model.use_windows(plan.windows_at(state.step))
            if due := [hook for hook in hooks if hook.due(state.step, plan.steps)]:
                reporter.flush(state)
                for hook in due:
                    if world.any_rank(requested()):
                        raise Stopped
                    hook.action(state)
                gc.collect()
                reporter.restart_clock()
                if resume.has_reached_target(plan, state.val_loss):
                    return "target_reached"
            if state.step >= plan.steps:
                return "finished"
            with contextlib.suppress(Stopped):
                state.loader.fetch(plan.units_at(state.step))
            if world.any_rank(requested()):  # then no rank has drawn a batch
                state.loader.put_back()
                break
            result = train_step(plan, state, world)
            state.step += 1
            keep_work()
            reporter.add(state, result)
            step_traced()
    reporter.flush(state)
    return "stopped"


def announce(plan: Plan, world: World) -> machine.Precision:
    """Choose how a run computes, and print that with its plan.

    Raises:
        UserError: this machine cannot compute as was asked.
    """
    args = plan.args
    precision, reason = attention_backends.choose_precision(
        world.device, args.dtype, args.attention, args.fp8, world, args.fp8_head
    )
    for line in (reason, *planning.describe(plan), *plan.notices):
        world.print0(line)
    return precision


def run(plan: Plan, stage: Stage, precision: machine.Precision, world: World) -> dict[str, Any]:
    """Train a plan from its start or its checkpoint to its end, and leave the files of a run behind.

    Returns:
        What summary.json holds.

    Raises:
        UserError: the base directory cannot be written, another process trains this run, or the checkpoint to
            go on from is of another run.
    """
    plan = planning.with_precision(plan, str(precision.compute_dtype).removeprefix("torch."), precision.fp8)
    memory.require_room(plan, world, precision.compute_dtype)
    with stop_signals(), _sole_owner(plan, world):
        return _run(plan, stage, precision, world)


@contextlib.contextmanager
def _sole_owner(plan: Plan, world: World) -> Iterator[None]:
    """Within, no other process trains this run: the main rank holds its lock, the others take its word."""
    error: UserError | OSError | None = None
    with contextlib.ExitStack() as stack:
        if world.is_main:
            folder, name = files.run_dir(plan.args.run_name), f"run {plan.args.run_name!r}"
            remedy = "Wait for its end, stop it, or name another run with --run."
            try:
                files.require_writable(folder)
                stack.enter_context(locks.held(folder / ".lock", name, remedy))
            except (UserError, OSError) as refused:
                error = refused
        if world.any_rank(error is not None):
            raise error or UserError("the main rank cannot begin; it says why.")
        yield


def _run(plan: Plan, stage: Stage, precision: machine.Precision, world: World) -> dict[str, Any]:
    folder, fingerprints = files.run_dir(plan.args.run_name), stage.fingerprints
    start = resume.starting_point(plan, world)
    state = create_state(plan, stage, precision, world)
    if start is None:
        stage.begin(state, world)
    else:
        for change in checkpoint_state.load(state, start, plan, fingerprints):
            world.print0(f"extended: {change}")
        if (summary := resume.summary_of_finished(plan, state.step, world)) is not None:
            world.print0(f"{folder} is finished already: {state.step} steps.")
            return summary
        world.print0(f"going on from {start}")
    plan = _prepare(plan, state, precision, world)
    speed = machine.speed(world.device, precision.compute_dtype)
    if world.is_main:
        resume.leave_other_branches(plan.args.run_name, state.step, world.print0)
        about = {**machine.describe(world.device), **world.describe(), **dataclasses.asdict(speed)}
        config = {"fingerprints": fingerprints, "machine": about, "provenance": machine.provenance()}
        files.write_json(folder / "config.json", {**plan.to_dict(), **config})
    with (
        contextlib.closing(state.loader),
        Watchdog(world, folder, plan.args.dist_timeout, lambda: f"step {state.step}"),
        contextlib.closing(RunLog(folder, world.is_main, state.step, plan.args.wandb)) as log,
    ):
        reporter = StepReporter(plan, world, log, speed)
        saver = Saver(plan, fingerprints, world, log.say, saved_step=state.step if start else None)
        status = train(plan, state, world, reporter, stage.hooks(plan, saver, world, log))
        if status != "finished":
            reason = "stopped by a signal" if status == "stopped" else "the target loss is reached"
            log.say(f"{reason} after step {state.step}")
            saver.save(state)
        saver.finish()
        summary = reporter.summary(state, status)
        if world.is_main:
            path, remedy = folder / "summary.json", "the same command with --resume=auto writes it"
            try:  # it follows from the checkpoint, which is saved by now
                files.write_json(path, summary)
            except OSError as error:
                warn(f"{path} could not be written ({error.strerror}); {remedy}")
    return summary


def conclude(summary: dict[str, Any], world: World) -> str:
    """Say how a run has ended and write its report; returns the status of the run."""
    run, status = str(summary["run"]), str(summary["status"])
    if world.is_main:
        ended = status.replace("_", " ")
        print(f"{ended} after {summary['steps']} steps, validation bpb {summary['val_bpb']}")
        try:
            print(f"report: {report.write_report(run)}")
        except (UserError, OSError) as error:  # it can be made again; the exit code is the run's
            warn(f"no report: {error}; python -m scripts.report --run {run} makes it")
    return status


def _prepare(plan: Plan, state: TrainState, precision: machine.Precision, world: World) -> Plan:
    """Choose the rows of a micro-batch that fit, and compile. Returns the plan with those rows."""
    rows = memory.rows_that_fit(plan, state, world, precision.compute_dtype)
    if hint := machine.quota_hint(world.device):
        world.print0(hint)
    plan, state.loader.device_batch_size = planning.with_micro_batch(plan, rows), rows
    compiles, reason = machine.choose_compile(world.device, plan.args.compile)
    world.print0(f"torch.compile is {'on' if compiles else 'off'} ({reason})")
    if compiles:
        world.print0(f"compiling with the first step, kept in {files.keep_compiled()} ...")
        state.model.compile_for(rows)
        state.optimizer.compile_updates()
        for first, _ in plan.schedule.window_stages:
            if first > state.step:  # so that no later step waits for it
                state.model.use_windows(plan.windows_at(first))
                ids = torch.zeros(rows, plan.model.sequence_len, dtype=torch.int64, device=world.device)
                state.model.loss(ids, ids).backward()  # type: ignore[no-untyped-call]
                state.model.zero_grad(set_to_none=True)
    return plan
