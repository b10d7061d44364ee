"""Memory of a training step: an estimate, the rows of a micro-batch that fit, half of them if it is wrong.

A micro-batch of too many rows ends a run, and one of too few wastes the device.

Legend: B rows of a micro-batch, T positions, C model width, V vocabulary, W ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from nanochat.checkpoint.state import TrainState
from nanochat.common import machine
from nanochat.common.errors import UserError
from nanochat.config.plan import Plan
from nanochat.data.train_loader import Batch
from nanochat.distributed.world import World
from nanochat.model.loss import CHUNK_ELEMENTS

# Activations in multiples of C a token: those kept for the backward pass, by layer, and those that one
# layer needs beside them while it runs backward. CPU: counted by saved_tensors_hooks at depths 4 and 6, 25.1
# in bf16 and 20.2 in fp32, 14.1 in bf16 without the MLPs', 1.0 without any. CUDA: peaks of storages at depths
# 12 and 24, bf16, sdpa (tests/gpuless): 18.7 + 7, 14.2 + 3, 1.3 + 25; a flash kernel keeps 15.
ACTIVATIONS = {
    "cpu": {"none": (26, 36), "mlp": (15, 36), "block": (1, 36)},
    "cuda": {"none": (20, 8), "mlp": (15, 8), "block": (2, 26)},
}
# More of those kept where attention is differential: on a CPU 6.1 (diff1) and 7.1 (diff2) in bf16, on CUDA
# 7.9 and 9.6 by sdpa, 5.1 and 4.0 by a flash kernel.
DIFFERENTIAL = {"cpu": 7, "cuda": 10}
# Moments of the block matrices, in multiples of them. SOAP adds a Gram matrix and a basis a side: to a block
# of 12 C^2 (4 squares, 2 matrices of 4 C x C) those of both sides add 84 C^2, of the shorter ones 12 C^2.
MOMENTS = {"muon": 1, "adamw": 2, "soap": 9}
ONE_SIDED = 3
USABLE = 0.9  # of the memory that is free; the rest is lost to fragmentation and to the system


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device.

    Attributes:
        parameters: fp32 masters, and their copies in the compute dtype.
        gradients: fp32.
        optimizer: moments that this rank keeps.
        activations: of one micro-batch, and logits of the chunk that the loss holds at a time.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def constant(self) -> int:
        """Bytes that the rows of a micro-batch do not change."""
        return self.parameters + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """All bytes."""
        return self.constant + self.activations


def estimate(plan: Plan, rows: int, dtype: torch.dtype, device_type: str) -> MemoryPlan:
    """The memory of micro-batches of `rows` rows, from the shape of the model."""
    model, params, tokens = plan.model, plan.params, rows * plan.model.sequence_len
    copies = 0 if dtype == torch.float32 else (params.matrix + params.unembedding) * dtype.itemsize
    rest = params.total - params.matrix  # two moments under AdamW
    one_sided = plan.args.matrix_optimizer == "soap" and plan.args.soap_sides == 1
    moments = ONE_SIDED if one_sided else MOMENTS[plan.args.matrix_optimizer]
    chunk = min(tokens * model.padded_vocab_size, CHUNK_ELEMENTS.get(device_type, CHUNK_ELEMENTS["cuda"]))
    like = "cuda" if device_type == "cuda" else "cpu"
    kept, working = ACTIVATIONS[like][plan.args.recompute]
    more = DIFFERENTIAL[like] if model.kind.maps > 1 else 0
    kept += more if plan.args.recompute != "block" else 0
    per_token = (kept * model.n_layer + working + 2 * more) * model.n_embd
    return MemoryPlan(
        parameters=4 * params.total + copies,
        gradients=4 * params.total,
        optimizer=4 * (moments * params.matrix + 2 * rest) // plan.world_size,
        activations=(tokens * per_token + chunk) * dtype.itemsize + 4 * params.unembedding,
    )


def require_room(plan: Plan, world: World, dtype: torch.dtype) -> None:
    """Refuse a model that no micro-batch makes fit, before it is built and the system ends the process.

    Raises:
        UserError: weights, gradients and moments are more than all the memory there is.
    """
    needed = estimate(plan, 1, dtype, world.device.type).constant
    there = machine.total_memory_bytes(world.device)
    if there is not None and needed > there:
        raise UserError(
            f"--depth={plan.args.depth}: its {plan.params.total / 1e9:,.1f} G parameters need "
            f"{needed / 1e9:,.0f} GB with gradients and moments, and a {world.device.type} here has "
            f"{there / 1e9:,.0f} GB. Lower --depth, --aspect-ratio or the vocabulary."
        )


def rows_that_fit(plan: Plan, state: TrainState, world: World, dtype: torch.dtype) -> int:
    """The rows of a micro-batch that fit every rank, the plan's at most. Prints what they need.

    A size that was asked for is kept. So is that of the checkpoint that a run goes on from, whatever memory
    is free now, since other rows add up in another order: it gives way only where the whole device is too
    small for it.
    """
    device, resumed, asked = world.device, state.resumed, plan.args.device_batch_size
    kept = resumed if resumed is not None and asked in (None, resumed.asked) else None
    rows_per_rank = plan.batch_rows // world.size
    rows, budget = plan.device_batch_size, machine.available_memory_bytes(device)
    if kept is not None:
        rows, asked = divisor_below(rows_per_rank, kept.rows + 1), kept.asked
        budget = machine.total_memory_bytes(device)
    elif budget is not None:  # parameters and moments are in memory already
        budget += estimate(plan, 1, dtype, device.type).optimizer + 4 * plan.params.total
    if budget is not None and asked is None:
        while rows > 1 and estimate(plan, rows, dtype, device.type).total > USABLE * budget:
            rows = divisor_below(rows_per_rank, rows)
    rows = -world.max_over_ranks(-rows)
    if resumed is not None and rows != resumed.rows:
        world.print0(
            f"micro-batches of {rows} rows, of {resumed.rows} before: sums are rounded in "
            "another order, so the weights will not be, to the bit, those of a run that never stopped"
        )
    needed = estimate(plan, rows, dtype, device.type)
    limit = "" if budget is None else f" of {budget / 1e9:.2f}"
    world.print0(
        f"memory, estimated: {needed.constant / 1e9:.2f} GB for weights, gradients and moments, "
        f"{needed.activations / 1e9:.2f} for activations of {rows} rows; {needed.total / 1e9:.2f}{limit}"
    )
    return rows


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


def halve_until_it_fits(
    passes: Callable[[list[Batch]], torch.Tensor],
    micro_batches: list[Batch],
    state: TrainState,
    world: World,
) -> torch.Tensor:
    """The result of `passes`; where memory runs out on any rank, all begin again with half the rows.

    Rows of a micro-batch stay halved from then on.

    Raises:
        UserError: memory runs out with one row.
    """
    while True:
        result = None
        try:
            result = passes(micro_batches)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        state.optimizer.reductions.catch_up()  # here, where what a failed pass held is free again
        if not world.any_rank(result is None) and result is not None:
            return result
        rows = len(micro_batches[0].inputs)
        if rows == 1:
            raise UserError("out of memory with one row in a micro-batch. Lower --max-seq-len or --depth.")
        smaller = divisor_below(rows, rows)
        world.print0(f"out of memory with {rows} rows in a micro-batch: going on with {smaller}")
        state.optimizer.reductions.abandon()
        state.model.zero_grad(set_to_none=True)
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
        state.loader.device_batch_size = smaller
        if state.model.is_compiled:
            state.model.compile_for(smaller)
        micro_batches = [part for batch in micro_batches for part in batch.split(smaller)]
