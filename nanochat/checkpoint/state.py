"""A run between two steps: taken to host memory, written, and put back; for training and for scoring.

What a checkpoint looks like on the disk is `format.py`. Tensors are full and keyed by parameter
name, so that any number of ranks can go on from them.

    python -m scripts.checkpoint list|verify|prune RUN
"""

from __future__ import annotations

import math
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from nanochat.checkpoint import format as checkpoint_format
from nanochat.checkpoint.compatibility import RETIRED_FLAGS, completed
from nanochat.checkpoint.format import MODEL, OPTIMIZER, STATE, Snapshot
from nanochat.checkpoint.resume import require_same_run
from nanochat.common import files, typed_json
from nanochat.common.errors import UserError
from nanochat.common.machine import Precision
from nanochat.config import arguments
from nanochat.config.arguments import TrainArgs
from nanochat.config.model_config import ATTENTION_KINDS, GPTConfig, count_params
from nanochat.config.plan import Plan
from nanochat.data.train_loader import Batch
from nanochat.distributed.world import World
from nanochat.model.gpt import GPT
from nanochat.optim.loss_scale import LossScale
from nanochat.optim.muon_adamw import MuonAdamW
from nanochat.tokenizer.tokenizer import Tokenizer

MAX_POSITIONS = 1 << 20  # rotary tables of more are refused: they are made, so no file's length bounds them


@dataclass(frozen=True)
class MicroBatch:
    """The micro-batch of a run when its checkpoint was made: the order of the sums, so the last bits of it.

    Attributes:
        rows: of one rank.
        asked: what --device-batch-size said, if anything.
    """

    rows: int
    asked: int | None


class Loader(Protocol):
    """The batches of a run, whatever its stage: drawn between two steps, with a position to go on from.

    Attributes:
        device_batch_size: rows of a micro-batch; may be changed between two steps.
    """

    device_batch_size: int

    @property
    def metrics(self) -> dict[str, float]:
        """What the line of a step says of the batch that was handed out last."""

    def fetch(self, batches: int) -> None:
        """Draw the next global batches, for `next_batch` to hand out; `Stopped` leaves nothing drawn."""

    def put_back(self) -> None:
        """Take back what `fetch` has drawn."""

    def next_batch(self) -> list[Batch]:
        """This rank's micro-batches of the next global batch."""

    def close(self) -> None:
        """Stop what runs beside the training."""

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch begins, the same on all ranks. A collective."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, on any number of ranks; `UserError` if it is not such a state."""


@dataclass
class TrainState:
    """A run between two steps. What is not in it is not part of the run.

    No random number is drawn in a step (seeds are in the plan), so there is no generator to keep.

    Attributes:
        step: optimizer steps done.
        model: the weights.
        optimizer: its moments.
        loader: the position in the data.
        loss_scale: the factor on the loss where the compute dtype is fp16.
        skipped_steps: steps among them whose update was held back, since it was not finite.
        smoothed_loss: exponential average of the training loss, in nats.
        train_seconds: seconds spent in steps, over all sessions of the run.
        val_bpb: newest validation bits per byte, or None before the first.
        min_val_bpb: lowest so far.
        val_loss: newest validation loss, nats per token.
        resumed: the micro-batch of the checkpoint that the run has gone on from, which `memory.rows_that_fit`
            keeps; that of now is the loader's, which halves it where memory runs out.
    """

    step: int
    model: GPT
    optimizer: MuonAdamW
    loader: Loader
    loss_scale: LossScale
    skipped_steps: int = 0
    smoothed_loss: float = 0.0
    train_seconds: float = 0.0
    val_bpb: float | None = None
    min_val_bpb: float | None = None
    val_loss: float | None = None
    resumed: MicroBatch | None = None


COUNTERS = ("step", "skipped_steps", "smoothed_loss", "train_seconds", "val_bpb", "min_val_bpb", "val_loss")


def snapshot(state: TrainState, plan: Plan, fingerprints: dict[str, str], world: World) -> Snapshot | None:
    """Copy a run to host memory, so that it can be written while training goes on. All ranks call it.

    Moments are gathered one tensor after another, and only the main rank keeps them. What is not finite is
    never saved: it would take the place of the checkpoints that a run can go on from.

    Args:
        state: the run.
        plan: what the run is.
        fingerprints: hashes of what the run depends on: corpus, tokenizer.
        world: the ranks.

    Returns:
        On the main rank, what to write; None on the others.

    Raises:
        UserError: a weight or a moment is not finite; on all ranks.
    """
    optimizer = state.optimizer.state_tensors(keep=world.is_main)
    loader = state.loader.state_dict()
    model = {}
    if world.is_main:
        model = {name: p.detach().to("cpu", copy=True) for name, p in state.model.named_parameters()}
    broken = checkpoint_format.first_not_finite({**model, **optimizer})
    if world.any_rank(broken is not None):
        raise UserError(
            f"after step {state.step}, {broken or 'a tensor of the main rank'} is not finite, so nothing is "
            "saved and training ends; the checkpoints of earlier steps are as they were. Start another run "
            "with a lower --matrix-lr, --embedding-lr or --weight-decay."
        )
    if not world.is_main:
        return None
    return Snapshot(
        checkpoint_format.folder_of(plan.args.run_name, state.step),
        model,
        optimizer,
        {
            **{name: getattr(state, name) for name in COUNTERS},
            "device_batch_size": state.loader.device_batch_size,
            "loader": loader,
            "loss_scale": state.loss_scale.state(),
            "fingerprints": fingerprints,
            "plan": plan.to_dict(),
        },
    )


def load(state: TrainState, folder: Path, plan: Plan, fingerprints: dict[str, str]) -> list[str]:
    """Put a verified checkpoint into `state`, which is then the run as it was.

    Returns:
        What of the plan has changed, as --extend allows.

    Raises:
        UserError: it is of a run with another plan, corpus or tokenizer, the differences are shown; or it is
            not what this program writes.
    """
    meta = checkpoint_format.read_state(folder)
    extended = require_same_run(meta, plan, fingerprints, folder)
    state.resumed = MicroBatch(meta["device_batch_size"], meta["plan"]["args"].get("device_batch_size"))
    weights = checkpoint_format.read_tensors(folder / MODEL)
    _require_fit(weights, state.model, folder / MODEL)
    state.model.load_state_dict(weights)
    _load_moments(state, folder)
    state.loader.load_state_dict(meta["loader"])
    state.loss_scale.load(meta["loss_scale"])
    for name in COUNTERS:
        setattr(state, name, meta[name])
    return extended


def _load_moments(state: TrainState, folder: Path) -> None:
    moments = checkpoint_format.read_tensors(folder / OPTIMIZER)
    try:
        state.optimizer.load_state_tensors(moments)
    except UserError as error:
        raise UserError(f"{folder / OPTIMIZER}: {error}") from None


def _require_fit(tensors: dict[str, Tensor], model: GPT, path: Path) -> None:
    """Every parameter is there, of its shape and fp32, and nothing else is."""
    parameters = dict(model.named_parameters())
    for name in sorted(parameters.keys() ^ tensors.keys()):
        where = "the model" if name in parameters else "the checkpoint"
        raise UserError(f"{path}: only {where} has {name!r}. It is of another depth or version.")
    for name, parameter in parameters.items():
        saved = tensors[name]
        if saved.dtype != torch.float32 or saved.shape != parameter.shape:
            raise UserError(
                f"{path}: {name} is {saved.dtype} of shape {tuple(saved.shape)}, expected torch.float32 of "
                f"shape {tuple(parameter.shape)}. The checkpoint is of another depth, vocabulary or version."
            )


def load_model(
    run: str, step: int | None = None, *, device: torch.device, precision: Precision
) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """The model and tokenizer of a run, for scoring and generation.

    Matrices and tables are held in the compute dtype, to which every pass would cast them: the same numbers,
    and half the memory where that is bf16.

    Args:
        run: name of the run.
        step: checkpoint to load; None for the newest that verifies.
        device: where the model goes.
        precision: how it computes.

    Returns:
        The model, its tokenizer, and state.json's contents ("step", "plan", "val_bpb", ...).

    Raises:
        UserError: unknown run, no usable checkpoint, or a tokenizer that is not the one it was trained with.
    """
    require_run(run)
    if loaded := checkpoint_format.read_newest(run, step, lambda at: _load_model(run, at, device, precision)):
        return loaded
    raise UserError(f"run {run!r} has no checkpoint yet. Train it first.")


def _load_model(
    run: str, folder: Path, device: torch.device, precision: Precision
) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    meta = checkpoint_format.read_state(folder)
    args = arguments_of(meta, folder)
    tokenizer = _tokenizer_of(run, args, meta)
    weights = checkpoint_format.read_tensors(folder / MODEL)
    shape = _model_config(completed(meta["plan"])["model"], weights, folder / STATE)
    with torch.device("meta"):
        model = GPT(shape, precision, tokenizer.bos_id if shape.document_mask else None)
    _require_fit(weights, model, folder / MODEL)
    model.to_empty(device=device)
    model.reserve_positions(shape.sequence_len)  # the rotary tables are not in the file
    model.load_state_dict(weights)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = parameter.data.to(precision.compute_dtype)
    return model.eval(), tokenizer, meta


@dataclass(frozen=True)
class Base:
    """A trained run that another begins with.

    Attributes:
        run: its name.
        step: of the checkpoint.
        folder: the checkpoint.
        sha256: hex digest of its manifest, which has those of all its files.
        args: the arguments of the run.
        batch_tokens: of its plan.
        model: the shape of the model.
        weights: fp32, by name, in host memory; the folder may be gone before they are needed.
        tokenizer: of the run.
        finetune: what the run has begun with itself; None for a base model.
    """

    run: str
    step: int
    folder: Path
    sha256: str
    args: TrainArgs
    batch_tokens: int
    model: GPTConfig
    weights: dict[str, Tensor]
    tokenizer: Tokenizer
    finetune: dict[str, Any] | None

    def warm_start(self, state: TrainState) -> None:
        """Give a run at step 0 these weights and moments; counters and data stay at their beginning.

        Raises:
            UserError: the checkpoint is of another shape, or damaged.
        """
        _require_fit(self.weights, state.model, self.folder / MODEL)
        state.model.load_state_dict(self.weights)
        _load_moments(state, self.folder)


def read_base(run: str, step: int | None) -> Base:
    """The run that another is to begin with.

    Args:
        run: its name.
        step: of its checkpoint; None for the newest that verifies.

    Raises:
        UserError: unknown run, no usable checkpoint, or a tokenizer that is not its own.
    """
    require_run(run)
    if base := checkpoint_format.read_newest(run, step, lambda folder: _read_base(run, folder)):
        return base
    raise UserError(f"run {run!r} has no checkpoint yet. Train it first.")


def _read_base(run: str, folder: Path) -> Base:
    meta = checkpoint_format.read_state(folder)
    args = arguments_of(meta, folder)
    plan, weights = completed(meta["plan"]), checkpoint_format.read_tensors(folder / MODEL)
    return Base(
        run,
        meta["step"],
        folder,
        files.sha256(folder / checkpoint_format.MANIFEST),
        args,
        plan["batch_tokens"],
        _model_config(plan["model"], weights, folder / STATE),
        weights,
        _tokenizer_of(run, args, meta),
        plan["finetune"],
    )


def _tokenizer_of(run: str, args: TrainArgs, meta: dict[str, Any]) -> Tokenizer:
    tokenizer = Tokenizer.load(files.tokenizer_dir(args.tokenizer_name))
    if tokenizer.fingerprint != meta["fingerprints"].get("tokenizer"):
        raise UserError(
            f"tokenizer {args.tokenizer_name!r} is not the one that run {run!r} was trained with. "
            "Put the old tokenizer.json back, or train again."
        )
    return tokenizer


def arguments_of(meta: dict[str, Any], folder: Path) -> TrainArgs:
    """The arguments of a checkpoint's run, without the flags that this version has no more.

    Raises:
        UserError: they are not those of a run.
    """
    given = {name: value for name, value in meta["plan"]["args"].items() if name not in RETIRED_FLAGS}
    return arguments.from_dict(TrainArgs, given, folder / STATE)


def _model_config(values: dict[str, Any], weights: dict[str, Tensor], path: Path) -> GPTConfig:
    """The shape that a checkpoint claims, if its tensors are of that size: a claim could ask for any memory.

    Raises:
        UserError: they are not.
    """
    kinds = typing.get_type_hints(GPTConfig)
    if unknown := sorted(values.keys() - kinds.keys()):
        raise UserError(
            f"{path}: the model has {unknown}, which this version does not know. Use a later one."
        )
    elements = sum(tensor.numel() for tensor in weights.values())
    is_typed = values.keys() == kinds.keys() and not any(
        typed_json.mismatch(value, kinds[name]) for name, value in values.items()
    )
    if is_typed and _is_plausible(values, len(weights), elements):
        shape = GPTConfig(**values)
        if count_params(shape).total == elements:
            return shape
    raise UserError(f"{path}: the model it describes is not that of its {elements:,} weights. Use another.")


def _is_plausible(values: dict[str, Any], tensors: int, elements: int) -> bool:
    """Whether a model of so many weights can have these sizes and constants."""
    sizes = [value for value in values.values() if type(value) is int]
    return (
        all(0 < size <= max(elements, MAX_POSITIONS) for size in sizes)
        and all(math.isfinite(value) for value in values.values() if type(value) is float)
        and values["n_layer"] <= tensors
        and values["n_head"] % values["n_kv_head"] == 0
        and values["attention_kind"] in ATTENTION_KINDS
        and values["head_dim"] % (2 * ATTENTION_KINDS[values["attention_kind"]].qk_divisor) == 0
        and values["sequence_len"] <= MAX_POSITIONS
        and len(values["window_pattern"]) > 0
        and set(values["window_pattern"]) <= {"S", "L"}
        and min(values["softcap"], values["rope_base"]) > 0
    )


def require_run(run: str) -> None:
    """Refuse a run that is not there.

    Raises:
        UserError: it lists those that are.
    """
    if not files.run_dir(run).is_dir():
        runs = files.run_dir(run).parent
        there = ", ".join(sorted(path.name for path in runs.iterdir())) if runs.is_dir() else ""
        raise UserError(
            f"unknown run {run!r} in {runs}. There are: {there or 'none'}. Train one, or name another."
        )
