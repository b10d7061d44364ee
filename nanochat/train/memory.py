"""What a step needs of one device's memory, the rows of a micro-batch that fit, and half of them if need be.

Legend: B rows of a micro-batch, T positions, C model width, V vocabulary, W ranks.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from nanochat.checkpoint.state import MicroBatch, TrainState
from nanochat.common import machine
from nanochat.common.errors import UserError
from nanochat.config.model_config import GPTConfig
from nanochat.config.plan import Plan
from nanochat.data.train_loader import Batch
from nanochat.distributed.world import World
from nanochat.model.loss import CHUNK_ELEMENTS

# Activations kept for the backward pass, in multiples of C a token and layer, counted by saved_tensors_hooks
# at depths 4 and 6: 25.1 in bf16 and 20.2 in fp32, 14.1 in bf16 without the MLPs', 1.0 without any.
KEPT = {"none": 26, "mlp": 15, "block": 1}
WORKING = 36  # of one layer, while it runs backward: its own activations and their gradients
# More of both where attention is differential: counted were 6.1 (diff1) and 7.1 (diff2) in bf16, 5.1 and 6.1
# in fp32.
DIFFERENTIAL = 7
# Moments of the block matrices, in multiples of them. SOAP adds a Gram matrix and a basis a side: to a block
# of 12 C^2 (4 squares, 2 matrices of 4 C x C) those of both sides add 84 C^2, of the shorter ones 12 C^2.
MOMENTS = {"muon": 1, "adamw": 2, "soap": 9}
ONE_SIDED = 3
USABLE = 0.9  # of the memory that is free; the rest is lost between blocks, and the system's


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device.

    Attributes:
        rows: of the micro-batch it is for.
        parameters: fp32 masters, and their copies in the compute dtype.
        gradients: fp32.
        optimizer: moments of this rank's share.
        activations: of one micro-batch.
        logits: of the chunk that the loss holds at a time.
        measured: whether activations and logits were measured by a step.
    """

    rows: int
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    measured: bool

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.logits

    def describe(self, available: int | None) -> str:
        """One line for the console."""
        parts = [
            f"{name} {getattr(self, name) / 1e9:.2f}" for name in ("parameters", "gradients", "optimizer")
        ]
        step = f"activations and logits {(self.activations + self.logits) / 1e9:.2f}"
        whole = "" if available is None else f" of {available / 1e9:.2f} available"
        return (
            f"memory, {'measured' if self.measured else 'estimated'}, in GB: {', '.join(parts)}, {step} "
            f"({self.rows} rows), together {self.total / 1e9:.2f}{whole}"
        )


def estimate(plan: Plan, rows: int, dtype: torch.dtype, device_type: str) -> MemoryPlan:
    """The plan for micro-batches of `rows` rows, from the shape of the model."""
    model, params, tokens = plan.model, plan.params, rows * plan.model.sequence_len
    copies = 0 if dtype == torch.float32 else (params.matrix + params.unembedding) * dtype.itemsize
    rest = params.total - params.matrix  # two moments under AdamW
    one_sided = plan.args.matrix_optimizer == "soap" and plan.args.soap_sides == 1
    moments = ONE_SIDED if one_sided else MOMENTS[plan.args.matrix_optimizer]
    chunk = min(tokens * model.padded_vocab_size, CHUNK_ELEMENTS.get(device_type, CHUNK_ELEMENTS["cuda"]))
    return MemoryPlan(
        rows=rows,
        parameters=4 * params.total + copies,
        gradients=4 * params.total,
        optimizer=4 * (moments * params.matrix + 2 * rest) // plan.world_size,
        activations=tokens * _activations(model, plan.args.recompute) * dtype.itemsize,
        logits=chunk * dtype.itemsize + 4 * params.unembedding,
        measured=False,
    )


def require_room(plan: Plan, world: World, dtype: torch.dtype) -> None:
    """Refuse a model that no micro-batch makes fit, before it is built and the system ends the process.

    Raises:
        UserError: weights, gradients and moments are more than all the memory there is.
    """
    known, there = estimate(plan, 1, dtype, world.device.type), machine.total_memory_bytes(world.device)
    needed = known.parameters + known.gradients + known.optimizer
    if there is not None and needed > there:
        raise UserError(
            f"--depth={plan.args.depth}: its {plan.params.total / 1e9:,.1f} G parameters need "
            f"{needed / 1e9:,.0f} GB with gradients and moments, and a {world.device.type} here has "
            f"{there / 1e9:,.0f} GB. Lower --depth, --aspect-ratio or the vocabulary."
        )


def _activations(model: GPTConfig, recompute: str) -> int:
    """Elements a token."""
    more = 0 if model.attention_kind == "softmax" else DIFFERENTIAL
    kept = KEPT[recompute] + (more if recompute != "block" else 0)
    return (kept * model.n_layer + WORKING + 2 * more) * model.n_embd


def measure(plan: Plan, state: TrainState, world: World, dtype: torch.dtype) -> list[MemoryPlan]:
    """Plans for one and two rows, from a forward and backward pass of each on CUDA. No parameter changes."""
    plans = []
    for rows in (1, 2):
        ids = torch.zeros(rows, plan.model.sequence_len, dtype=torch.int64, device=world.device)
        torch.cuda.synchronize(world.device)
        torch.cuda.reset_peak_memory_stats(world.device)
        before = torch.cuda.memory_allocated(world.device)
        state.model.loss(ids, ids).backward()  # type: ignore[no-untyped-call]
        step = torch.cuda.max_memory_allocated(world.device) - before
        state.model.zero_grad(set_to_none=True)
        known = estimate(plan, rows, dtype, world.device.type)
        activations = max(0, step - known.gradients)
        plans.append(dataclasses.replace(known, activations=activations, logits=0, measured=True))
    return plans


def plan_memory(plan: Plan, state: TrainState, world: World, dtype: torch.dtype) -> MemoryPlan:
    """The rows of a micro-batch that fit every rank, the plan's at most, and what they need.

    A size that was asked for is kept. So is that of the checkpoint that a run goes on from, whatever memory
    is free now, since other rows add up in another order: it gives way only where the whole device is too
    small for it. On CUDA each rank measures a step of one and of two rows, and the rest follows on a line;
    elsewhere the shape of the model tells.
    """
    known = estimate(plan, 1, dtype, world.device.type)
    kept = _kept(plan, state)
    asked = kept.asked if kept else plan.args.device_batch_size
    free = (machine.total_memory_bytes if kept else machine.available_memory_bytes)(world.device)
    # Parameters and moments are in memory already; the whole of a device has room for them, too.
    there = 0 if kept else known.optimizer + 4 * plan.params.total
    budget = None if free is None or asked is not None else free + there
    measured = measure(plan, state, world, dtype) if world.device.type == "cuda" and asked is None else []

    def of(rows: int) -> MemoryPlan:
        if not measured:
            return estimate(plan, rows, dtype, world.device.type)
        one, two = (found.activations for found in measured)
        return dataclasses.replace(measured[0], rows=rows, activations=one + (rows - 1) * max(0, two - one))

    rows_per_rank = plan.batch_rows // world.size
    rows = divisor_below(rows_per_rank, kept.rows + 1) if kept else plan.device_batch_size
    while budget is not None and rows > 1 and of(rows).total > USABLE * budget:
        rows = divisor_below(rows_per_rank, rows)
    found = of(-world.max_over_ranks(-rows))
    if state.resumed is not None and found.rows != state.resumed.rows:
        world.print0(
            f"micro-batches of {found.rows} rows, of {state.resumed.rows} before: sums are rounded in "
            "another order, so the weights will not be, to the bit, those of a run that never stopped"
        )
    return found


def _kept(plan: Plan, state: TrainState) -> MicroBatch | None:
    """The micro-batch of the checkpoint, unless another one is asked for than was asked for then."""
    asked = plan.args.device_batch_size
    if state.resumed is None or (asked is not None and asked != state.resumed.asked):
        return None
    return state.resumed


def divisor_below(whole: int, n: int) -> int:
    """The largest divisor of `whole` below n, which is above 1.

    >>> divisor_below(24, 12), divisor_below(7, 7)
    (8, 1)
    """
    return next(d for d in range(min(n - 1, whole), 0, -1) if whole % d == 0)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed: PyTorch's CPU allocator has no exception of its own."""
    text = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and ("not enough memory" in text or "can't allocate memory" in text)
    )


def halve(state: TrainState, micro_batches: list[Batch], world: World) -> list[Batch]:
    """Take the same rows in micro-batches of half the rows, from here on; half-made gradients are dropped.

    Raises:
        UserError: there is one row in each already.
    """
    rows = len(micro_batches[0][0])
    if rows == 1:
        raise UserError("out of memory with one row in a micro-batch. Lower --max-seq-len or --depth.")
    smaller = rows // 2 if rows % 2 == 0 else divisor_below(rows, rows)
    world.print0(f"out of memory with {rows} rows in a micro-batch: going on with {smaller}")
    state.model.zero_grad(set_to_none=True)
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    state.loader.device_batch_size = smaller
    if state.model.is_compiled:
        state.model.compile_for(smaller)
    return [
        pair
        for inputs, targets in micro_batches
        for pair in zip(inputs.split(smaller), targets.split(smaller), strict=True)  # type: ignore[no-untyped-call]
    ]
