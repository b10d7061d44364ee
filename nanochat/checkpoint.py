"""Checkpoints: safetensors and JSON in a folder that is whole or not there; a manifest of hashes tells which.

Layout: checkpoints/step_000500/{model.safetensors, optimizer.safetensors, state.json, MANIFEST.json}. Tensors
are full and keyed by parameter name, so that any number of ranks can go on from them.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanochat import config, files
from nanochat.dataloader import TrainLoader
from nanochat.errors import UserError
from nanochat.gpt import GPT
from nanochat.hardware import Precision
from nanochat.loss_scale import LossScale
from nanochat.optim import MuonAdamW
from nanochat.scaling import GPTConfig, Plan
from nanochat.tokenizer import Tokenizer
from nanochat.world import World

FORMAT = 1
MODEL, OPTIMIZER, STATE, MANIFEST = (
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
    "MANIFEST.json",
)
SPARE_BYTES = 64 << 20  # left free on the disk beside a checkpoint


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
        smoothed_loss: exponential average of the training loss, in nats.
        train_seconds: seconds spent in steps, over all sessions of the run.
        val_bpb: newest validation bits per byte, or None before the first.
        min_val_bpb: lowest so far.
    """

    step: int
    model: GPT
    optimizer: MuonAdamW
    loader: TrainLoader
    loss_scale: LossScale
    smoothed_loss: float = 0.0
    train_seconds: float = 0.0
    val_bpb: float | None = None
    min_val_bpb: float | None = None


COUNTERS = ("step", "smoothed_loss", "train_seconds", "val_bpb", "min_val_bpb")


def folder_of(run: str, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return files.checkpoints_dir(run) / f"step_{step:06d}"


def steps_of(run: str) -> list[int]:
    """Steps that have a checkpoint folder with a manifest, ascending. Nothing is verified."""
    folders = files.checkpoints_dir(run).glob("step_*/" + MANIFEST)
    return sorted(int(path.parent.name.removeprefix("step_")) for path in folders)


def save(state: TrainState, plan: Plan, fingerprints: dict[str, str], world: World) -> Path:
    """Write a checkpoint of `state`, then drop the oldest beyond `--keep-last`. All ranks call it.

    Args:
        state: the run.
        plan: what the run is.
        fingerprints: hashes of what the run depends on: corpus, tokenizer.
        world: the ranks; the main one writes.

    Returns:
        The folder of the checkpoint.

    Raises:
        UserError: not enough free space.
        OSError: the disk refused; the earlier checkpoints are as they were.
    """
    run = plan.args.run_name
    folder = folder_of(run, state.step)
    model = {name: parameter.detach() for name, parameter in state.model.named_parameters()}
    optimizer, loader = state.optimizer.state_tensors(), state.loader.state_dict()  # collectives
    if world.is_main:
        meta = {
            "format": FORMAT,
            "made_by": f"nanochat {version('nanochat')}",
            **{name: getattr(state, name) for name in COUNTERS},
            "loader": loader,
            "loss_scale": state.loss_scale.state(),
            "fingerprints": fingerprints,
            "plan": plan.to_dict(),
        }
        _require_space(folder, [*model.values(), *optimizer.values()])
        files.sweep_temporaries(folder.parent)
        _write(folder, model, optimizer, meta)
        _prune(run, plan.args.keep_last)
    world.barrier()
    return folder


def _require_space(folder: Path, tensors: list[Tensor]) -> None:
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors) + SPARE_BYTES
    if (free := files.free_bytes(folder)) < needed:
        raise UserError(
            f"{folder}: a checkpoint needs {needed:,} bytes and {free:,} are free. "
            "Free some space; the earlier checkpoints are as they were."
        )


def _write(
    folder: Path, model: dict[str, Tensor], optimizer: dict[str, Tensor], meta: dict[str, Any]
) -> None:
    with files.atomic_dir(folder) as temporary:
        _save_tensors(temporary / MODEL, model)
        _save_tensors(temporary / OPTIMIZER, optimizer)
        files.write_json(temporary / STATE, meta)
        listed = {
            path.name: {"bytes": path.stat().st_size, "sha256": files.sha256(path)}
            for path in sorted(temporary.iterdir())
        }
        files.write_json(temporary / MANIFEST, {"format": FORMAT, "files": listed})


def _save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    on_cpu = {name: tensor.to("cpu").contiguous() for name, tensor in tensors.items()}
    try:
        save_file(on_cpu, path)
    except SafetensorError as error:  # how the library reports a full disk
        raise OSError(f"{path.parent}: cannot write a checkpoint ({error})") from error


def _prune(run: str, keep_last: int) -> None:
    for step in steps_of(run)[:-keep_last]:
        files.remove_dir(folder_of(run, step))


def verify(folder: Path) -> None:
    """Check every file of a checkpoint against its manifest.

    Raises:
        UserError: a file is missing, of another length, or of another hash; it is named.
    """
    manifest = files.read_json(folder / MANIFEST)
    listed = manifest.get("files") if isinstance(manifest, dict) else None
    if (
        not isinstance(listed, dict)
        or set(listed) != {MODEL, OPTIMIZER, STATE}
        or manifest != {"format": FORMAT, "files": listed}
    ):
        raise UserError(f"{folder / MANIFEST}: not a manifest of this version. Use another checkpoint.")
    for name, entry in listed.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: missing, although the manifest lists it. Use another checkpoint.")
        if path.stat().st_size != entry["bytes"]:
            raise UserError(
                f"{path}: {path.stat().st_size:,} bytes where the manifest says {entry['bytes']:,}. "
                "Use another checkpoint."
            )
        if (found := files.sha256(path)) != entry["sha256"]:
            raise UserError(
                f"{path}: sha256 {found[:12]} is not the manifest's {entry['sha256'][:12]}. "
                "Use another checkpoint."
            )


def find(run: str, step: int | None, say: Any = print) -> Path | None:
    """The folder of a verified checkpoint.

    Args:
        run: name of the run.
        step: the step asked for; None for the newest that verifies.
        say: told of each bad checkpoint that is passed over.

    Returns:
        The folder, or None if the newest was asked for and there is none at all.

    Raises:
        UserError: the step asked for has no checkpoint or a bad one, or all there are are bad.
    """
    present = steps_of(run)
    if step is not None:
        if step not in present:
            there = ", ".join(map(str, present)) or "none"
            raise UserError(f"run {run!r} has no checkpoint of step {step}. There are: {there}.")
        verify(folder_of(run, step))
        return folder_of(run, step)
    for candidate in reversed(present):
        try:
            verify(folder_of(run, candidate))
        except UserError as error:
            say(f"checkpoint passed over: {error}")
        else:
            return folder_of(run, candidate)
    if present:
        raise UserError(f"run {run!r}: none of its {len(present)} checkpoints is whole. Start the run anew.")
    return None


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file ({error}). Use another checkpoint.") from None


def _load_weights(model: GPT, path: Path) -> None:
    """Copy the weights of a file into a model of the same shape."""
    tensors = _read_tensors(path)
    parameters = dict(model.named_parameters())
    for name in sorted(parameters.keys() ^ tensors.keys()):
        where = "the model" if name in parameters else "the checkpoint"
        raise UserError(f"{path}: only {where} has {name!r}. It is of another depth or version.")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != tensors[name].shape:
                raise UserError(
                    f"{path}: {name} has shape {tuple(tensors[name].shape)} where the model has "
                    f"{tuple(parameter.shape)}. The checkpoint is of another depth or vocabulary."
                )
            parameter.copy_(tensors[name])


def load(state: TrainState, folder: Path, plan: Plan, fingerprints: dict[str, str]) -> None:
    """Put a verified checkpoint into `state`, which is then the run as it was.

    Raises:
        UserError: it is of a run with another plan, corpus or tokenizer; the differences are shown.
    """
    meta = files.read_json(folder / STATE)
    _require_same_run(meta, plan, fingerprints, folder)
    _load_weights(state.model, folder / MODEL)
    state.optimizer.load_state_tensors(_read_tensors(folder / OPTIMIZER))
    state.loader.load_state_dict(meta["loader"])
    state.loss_scale.load(meta["loss_scale"])
    for name in COUNTERS:
        setattr(state, name, meta[name])


# What a resumed run may not change: these decide the weights and the data. World size, micro-batch, cadences,
# names and the machine are free.
FIXED_ARGS = ("corpus", "keep_tails", "seed")
FIXED_PLAN = ("model", "batch_tokens", "lanes", "steps", "groups", "schedule")


def _require_same_run(meta: dict[str, Any], plan: Plan, fingerprints: dict[str, str], folder: Path) -> None:
    if meta.get("format") != FORMAT:
        raise UserError(
            f"{folder / STATE}: format {meta.get('format')!r}, made by {meta.get('made_by')!r}; this version "
            f"reads format {FORMAT}. Go on with the version that made it."
        )
    now: dict[str, Any] = json.loads(json.dumps(plan.to_dict()))
    then = meta["plan"]
    pairs = {
        f"--{name.replace('_', '-')}": (then["args"].get(name), now["args"][name]) for name in FIXED_ARGS
    }
    pairs |= {name: (then.get(name), now[name]) for name in FIXED_PLAN}
    pairs |= {f"{name} hash": (meta["fingerprints"].get(name), value) for name, value in fingerprints.items()}
    changed = [f"{name}: {old!r} then, {new!r} now" for name, (old, new) in pairs.items() if old != new]
    if changed:
        raise UserError(
            f"{folder}: cannot be resumed, since these differ: {'; '.join(changed)}. "
            "Give the same arguments as before, or start another run with --run."
        )


def load_model(
    run: str, step: int | None = None, *, device: torch.device, precision: Precision
) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """The model and tokenizer of a run, for scoring and generation.

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
    if not files.run_dir(run).is_dir():
        runs = files.run_dir(run).parent
        there = ", ".join(sorted(path.name for path in runs.iterdir())) if runs.is_dir() else ""
        raise UserError(
            f"unknown run {run!r} in {runs}. There are: {there or 'none'}. Train one, or name another."
        )
    folder = find(run, step)
    if folder is None:
        raise UserError(f"run {run!r} has no checkpoint yet. Train it first.")
    meta = files.read_json(folder / STATE)
    if meta.get("format") != FORMAT:
        raise UserError(f"{folder / STATE}: format {meta.get('format')!r}, made by {meta.get('made_by')!r}.")
    args = config.from_dict(config.TrainArgs, meta["plan"]["args"])
    tokenizer = Tokenizer.load(files.tokenizer_dir(args.tokenizer_name))
    if tokenizer.fingerprint != meta["fingerprints"]["tokenizer"]:
        raise UserError(
            f"tokenizer {args.tokenizer_name!r} is not the one that run {run!r} was trained with. "
            "Put the old tokenizer.json back, or train again."
        )
    shape = meta["plan"]["model"]
    model_config = GPTConfig(**{item.name: shape[item.name] for item in dataclasses.fields(GPTConfig)})
    with torch.device("meta"):
        model = GPT(model_config, precision)
    model.to_empty(device=device)
    model.reserve_positions(model_config.sequence_len)  # the rotary tables are not in the file
    _load_weights(model, folder / MODEL)
    return model.eval(), tokenizer, meta
