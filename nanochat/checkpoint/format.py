"""Checkpoint folders: their files, written atomically with a manifest; listed, verified, pruned, read.

Layout: checkpoints/step_000500/{model.safetensors, optimizer.safetensors, state.json, MANIFEST.json}. The
manifest holds the length and sha256 of the others and is written last, before the folder takes its name.
Where a run goes on from an earlier step, those of later steps are put into checkpoints/abandoned/: what a run
has at its own names is one line of steps, in which a higher step was written later.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanochat.common import files, typed_json
from nanochat.common.errors import UserError

T = TypeVar("T")

FORMAT = 1
ABANDONED = "abandoned"  # checkpoints of a branch that the run has left
MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
STATE, MANIFEST = "state.json", "MANIFEST.json"
SPARE_BYTES = 64 << 20  # left free on the disk beside a checkpoint
MAX_JSON_BYTES = 16 << 20  # of state.json, whose cursors are some bytes a lane; nothing larger is parsed
ADVICE = "Use another checkpoint."
MAX_HEADER_BYTES = 16 << 20  # of a safetensors file: about 100 bytes a tensor


def folder_of(run: str, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return files.checkpoints_dir(run) / f"step_{step:06d}"


def steps_of(run: str) -> list[int]:
    """Steps that have a checkpoint folder, ascending, damaged or not. Nothing in them is looked at.

    Raises:
        UserError: the folder of the checkpoints cannot be read, so that nobody knows whether there are any.
    """
    folder = files.checkpoints_dir(run)
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be listed ({error.strerror}), so what is there is not known. Give access."
        ) from None
    steps = {name: int(match[1]) for name in names if (match := re.fullmatch(r"step_([0-9]{6,15})", name))}
    return sorted(step for name, step in steps.items() if name == folder_of(run, step).name)


# ----------------------------------------------------------------------------------------------------
# writing


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint will hold, in host memory that training does not touch.

    Attributes:
        folder: where it goes.
        model: fp32 weights by parameter name.
        optimizer: whole moments by "<parameter>.<moment>".
        meta: what state.json holds.
    """

    folder: Path
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    meta: dict[str, Any]

    def write(self) -> float:
        """Write the checkpoint; at its name it is whole or not there.

        Returns:
            Seconds that it took.

        Raises:
            UserError: not enough free space.
            OSError: the disk refused; the earlier checkpoints are as they were.
        """
        started = time.monotonic()
        self._require_space()
        with files.atomic_dir(self.folder, owned="*") as temporary:
            save_tensors(temporary / MODEL, self.model)
            save_tensors(temporary / OPTIMIZER, self.optimizer)
            head = {"format": FORMAT, "made_by": f"nanochat {version('nanochat')}"}
            files.write_json(temporary / STATE, {**head, **self.meta})
            listed = {
                path.name: {"bytes": path.stat().st_size, "sha256": files.sha256(path)}
                for path in sorted(temporary.iterdir())
            }
            files.write_json(temporary / MANIFEST, {"format": FORMAT, "files": listed})
        return time.monotonic() - started

    def _require_space(self) -> None:
        tensors = (*self.model.values(), *self.optimizer.values())
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors) + SPARE_BYTES
        if (free := files.free_bytes(self.folder)) < needed:
            raise UserError(
                f"{self.folder}: a checkpoint needs {needed:,} bytes and {free:,} are free. "
                "Free some space; the earlier checkpoints are as they were."
            )


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file.

    Raises:
        OSError: the disk is full or fails; the library has an error of its own for that.
    """
    path.touch()  # the library makes files that only their owner reads; the umask decides, as for all others
    mode = stat.S_IMODE(path.stat().st_mode)
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written ({error})") from error
    path.chmod(mode)


def set_aside(run: str, step: int) -> list[Path]:
    """Put the checkpoints of steps after `step` into checkpoints/abandoned/, before a run goes on there.

    They are of another branch of the run, or damaged: left at their names, they would pass for newer ones.

    Returns:
        Where they are now.
    """
    moved = []
    for later in (at for at in steps_of(run) if at > step):
        folder = folder_of(run, later)
        target = _abandoned(folder)
        target.parent.mkdir(exist_ok=True)
        number = 1
        while os.path.lexists(target):
            number += 1
            target = target.with_name(f"{folder.name}.{number}")
        folder.rename(target)
        moved.append(target)
    if moved:
        files.fsync(moved[0].parent)
        files.fsync(moved[0].parent.parent)
    return moved


def _abandoned(folder: Path) -> Path:
    return folder.parent / ABANDONED / folder.name


def retained(run: str, newest: int) -> list[int]:
    """Steps up to `newest` whose files are all there in their length: what retention counts as whole."""
    complete = []
    for step in (step for step in steps_of(run) if step <= newest):
        folder = folder_of(run, step)
        with contextlib.suppress(UserError):
            for name, entry in _read_manifest(folder).items():
                _require_length(folder / name, entry)
            complete.append(step)
    return complete


def prune(
    run: str, whole: list[int], keep_last: int, keep_every: int = 0, say: Callable[[str], None] = print
) -> list[int]:
    """Delete old checkpoints; to be called when a new one is whole.

    Args:
        run: name of the run.
        whole: steps of it that are whole, ascending; no other is deleted or counted.
        keep_last: how many of the newest to keep.
        keep_every: also keep those of steps that this divides; 0 for none.
        say: told of each that cannot be deleted: one too many does no harm.

    Returns:
        The steps deleted.
    """
    assert keep_last >= 1
    deleted = []
    for step in whole[:-keep_last]:
        if keep_every and step % keep_every == 0:
            continue
        folder = folder_of(run, step)
        try:
            files.remove_dir(folder)
        except FileNotFoundError:  # somebody else was faster
            continue
        except OSError as error:
            say(f"warning: {folder} could not be deleted ({error.strerror}); the next save tries again")
        else:
            deleted.append(step)
    return deleted


# ----------------------------------------------------------------------------------------------------
# reading: a checkpoint may come from anywhere, so nothing in it is believed


class _Plan(TypedDict):
    """The parts of a plan that every version has written down."""

    args: dict[str, Any]
    model: dict[str, Any]


class _State(TypedDict):
    """The fields of state.json that a run or a model is made from."""

    step: int
    skipped_steps: float
    smoothed_loss: float
    train_seconds: float
    val_bpb: float | None
    min_val_bpb: float | None
    val_loss: float | None
    device_batch_size: int
    loss_scale: list[float]
    loader: dict[str, Any]
    fingerprints: dict[str, Any]
    plan: _Plan


@contextlib.contextmanager
def _damage_of(path: Path) -> Iterator[None]:
    """Turn an error of reading, as of a bad sector or of permissions, into damage of that file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}). {ADVICE}") from error


def verify(folder: Path) -> None:
    """Check every file of a checkpoint against its manifest.

    Raises:
        UserError: a file is missing, unreadable, a link, of another length, or of another hash; it is named.
    """
    for name, entry in _read_manifest(folder).items():
        path = folder / name
        _require_length(path, entry)
        with _damage_of(path):
            digest = files.sha256(path)
        if digest != (listed := str(entry["sha256"])):
            raise UserError(f"{path}: sha256 {digest[:12]} is not the manifest's {listed[:12]}. {ADVICE}")


def _read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """The length and sha256 of each file of a checkpoint, as its manifest lists them."""
    manifest = _read_small_json(folder / MANIFEST)
    listed = manifest.get("files") if isinstance(manifest, dict) else None
    if (
        not isinstance(listed, dict)
        or set(listed) != {MODEL, OPTIMIZER, STATE}
        or manifest != {"format": FORMAT, "files": listed}
        or not all(isinstance(entry, dict) and set(entry) == {"bytes", "sha256"} for entry in listed.values())
    ):
        raise UserError(f"{folder / MANIFEST}: not a manifest of this version. {ADVICE}")
    return listed


def _require_length(path: Path, entry: dict[str, Any]) -> None:
    with _damage_of(path):
        if path.is_symlink() or not path.is_file():
            kind = "a link" if path.is_symlink() else "missing"
            raise UserError(f"{path}: {kind}, although the manifest lists it. {ADVICE}")
        if path.stat().st_size != entry["bytes"]:
            claimed = f"where the manifest says {entry['bytes']!r}"
            raise UserError(f"{path}: {path.stat().st_size:,} bytes {claimed}. {ADVICE}")


def find(run: str, step: int | None, say: Callable[[str], None] = print) -> Path | None:
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
        return _find_step(run, step, present)
    while present:
        reason = ""
        for folder in (folder_of(run, candidate) for candidate in reversed(present)):
            try:
                verify(folder)
            except UserError as error:
                if not _is_gone(folder):  # else a trainer has deleted it meanwhile
                    reason = reason or str(error)
                    say(f"checkpoint passed over: {error}")
            else:
                return folder
        if (again := steps_of(run)) == present:
            raise UserError(
                f"run {run!r}: none of its {len(present)} checkpoints is whole; of the newest: {reason} "
                f"Put a copy of one back; or move {files.checkpoints_dir(run)} away, to begin at step 0."
            )
        present = again
    return None


def _find_step(run: str, step: int, present: list[int]) -> Path:
    folder = folder_of(run, step)
    if step not in present:
        there = ", ".join(map(str, present)) or "none"
        aside = _abandoned(folder)
        hint = f" {aside} was set aside: move it back to use it." if aside.is_dir() else ""
        raise UserError(f"run {run!r} has no checkpoint of step {step}. There are: {there}.{hint}")
    verify(folder)
    return folder


def _is_gone(folder: Path) -> bool:
    try:
        folder.lstat()
    except OSError as error:
        return isinstance(error, FileNotFoundError)
    return False


def read_newest(run: str, step: int | None, read: Callable[[Path], T]) -> T | None:
    """What `read` makes of a verified checkpoint's folder, beside a trainer that may delete it meanwhile.

    Args:
        run: name of the run.
        step: the step asked for; None for the newest that verifies.
        read: reads the folder that it is given; called again with another where that one has gone.

    Returns:
        What it returned, or None if the newest was asked for and there is none at all.

    Raises:
        UserError: as `find`, and whatever `read` raises about a folder that is still there.
    """
    while (folder := find(run, step)) is not None:
        try:
            return read(folder)
        except (UserError, OSError):
            if step is not None or not _is_gone(folder):
                raise
    return None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, in host memory.

    Raises:
        UserError: not a safetensors file, one whose header is absurd, or one that holds a number that is not
            finite: the texts and scores of such a model look like any other's.
    """
    with _damage_of(path), path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > min(MAX_HEADER_BYTES, path.stat().st_size):
            raise UserError(f"{path}: its header would have {header_bytes:,} bytes. {ADVICE}")
        try:
            typed_json.parse(file.read(header_bytes))  # of two entries of a name, the library takes the last
            tensors: dict[str, Tensor] = load_file(path)
        except (SafetensorError, ValueError, KeyError, RuntimeError, OverflowError) as error:
            raise UserError(f"{path}: not a safetensors file ({error}). {ADVICE}") from None
    if (broken := first_not_finite(tensors)) is not None:
        raise UserError(f"{path}: {broken} is not finite. {ADVICE}")
    return tensors


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds a NaN or an infinity; None if all are finite."""
    for name, tensor in tensors.items():
        # One pass, and no second tensor of that size: a NaN is its own minimum. No other dtype is ever used.
        is_ours = tensor.dtype == torch.float32 and tensor.numel() > 0
        if is_ours and not torch.stack(tensor.aminmax()).isfinite().all():
            return name
    return None


def read_state(folder: Path) -> dict[str, Any]:
    """The contents of state.json, of this version's format, in which every number is one.

    Raises:
        UserError: it is not what this version writes; the version that wrote it is named, or the first wrong
            field.
    """
    meta = _read_small_json(folder / STATE)
    head: dict[str, Any] = meta if isinstance(meta, dict) else {}
    if head.get("format") != FORMAT:
        raise UserError(
            f"{folder / STATE}: format {head.get('format')!r}, made by {head.get('made_by')!r}; this "
            f"version reads format {FORMAT}. Go on with the version that made it."
        )
    early: dict[str, Any] = {"val_loss": None, "loss_scale": []}  # the first checkpoints do not say it
    if isinstance(head.get("plan"), dict):
        early["device_batch_size"] = head["plan"].get("device_batch_size")
    head = early | head
    if not (wrong := typed_json.mismatch(head, _State)):
        right = {
            "step": folder.name == f"step_{head['step']:06d}",
            "device_batch_size": head["device_batch_size"] >= 1,
            "loss_scale": len(head["loss_scale"]) in (0, 2),
        }
        wrong = next((f"{name} is {typed_json.shown(head[name])}" for name in right if not right[name]), "")
    if wrong:
        raise UserError(f"{folder / STATE}: {wrong}. {ADVICE}")
    return head


def _read_small_json(path: Path) -> Any:
    with _damage_of(path):
        if path.is_symlink():
            raise UserError(f"{path}: a link, not a plain file. {ADVICE}")
        if path.exists() and path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{path}: {path.stat().st_size:,} bytes, far more than it can need. {ADVICE}")
        return files.read_json(path, advice=ADVICE)
