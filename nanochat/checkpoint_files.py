"""The folders of a run's checkpoints: written whole, hashed, listed, verified, pruned, read with distrust.

Layout: checkpoints/step_000500/{model.safetensors, optimizer.safetensors, state.json, MANIFEST.json}. The
manifest holds the length and sha256 of the others and is written last, before the folder takes its name.
"""

from __future__ import annotations

import json
import re
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanochat import files
from nanochat.errors import UserError

FORMAT = 1
MODEL, OPTIMIZER, STATE, MANIFEST = (
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
    "MANIFEST.json",
)
SPARE_BYTES = 64 << 20  # left free on the disk beside a checkpoint
MAX_JSON_BYTES = 16 << 20  # of state.json, whose cursors are some bytes a lane; nothing larger is parsed
MAX_HEADER_BYTES = 16 << 20  # of a safetensors file: about 100 bytes a tensor


def folder_of(run: str, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return files.checkpoints_dir(run) / f"step_{step:06d}"


def steps_of(run: str) -> list[int]:
    """Steps that have a checkpoint folder with a manifest, ascending. Nothing is verified."""
    folders = files.checkpoints_dir(run).glob("step_*/" + MANIFEST)
    matches = (re.fullmatch(r"step_(\d{6,15})", path.parent.name) for path in folders)
    return sorted(int(match[1]) for match in matches if match)


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
        files.sweep_temporaries(self.folder.parent, own=True)
        with files.atomic_dir(self.folder) as temporary:
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


def prune(run: str, steps: list[int], keep_last: int, keep_every: int = 0) -> list[int]:
    """Delete old checkpoints; to be called when a new one is whole.

    Args:
        run: name of the run.
        steps: those it has, ascending.
        keep_last: how many of the newest to keep.
        keep_every: also keep those of steps that this divides; 0 for none.

    Returns:
        The steps deleted.
    """
    assert keep_last >= 1
    doomed = [step for step in steps[:-keep_last] if not keep_every or step % keep_every]
    for step in doomed:
        files.remove_dir(folder_of(run, step))
    return doomed


# ----------------------------------------------------------------------------------------------------
# reading: a checkpoint may come from anywhere, so nothing in it is believed


def verify(folder: Path) -> None:
    """Check every file of a checkpoint against its manifest.

    Raises:
        UserError: a file is missing, a link, of another length, or of another hash; it is named.
    """
    manifest = _read_small_json(folder / MANIFEST)
    listed = manifest.get("files") if isinstance(manifest, dict) else None
    if (
        not isinstance(listed, dict)
        or set(listed) != {MODEL, OPTIMIZER, STATE}
        or manifest != {"format": FORMAT, "files": listed}
        or not all(isinstance(entry, dict) and set(entry) == {"bytes", "sha256"} for entry in listed.values())
    ):
        raise UserError(f"{folder / MANIFEST}: not a manifest of this version. Use another checkpoint.")
    for name, entry in listed.items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            kind = "a link" if path.is_symlink() else "missing"
            raise UserError(f"{path}: {kind}, although the manifest lists it. Use another checkpoint.")
        if path.stat().st_size != entry["bytes"]:
            raise UserError(
                f"{path}: {path.stat().st_size:,} bytes where the manifest says {entry['bytes']!r}. "
                "Use another checkpoint."
            )
        if (found := files.sha256(path)) != entry["sha256"]:
            raise UserError(
                f"{path}: sha256 {found[:12]} is not the manifest's {str(entry['sha256'])[:12]}. "
                "Use another checkpoint."
            )


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


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, in host memory.

    Raises:
        UserError: not a safetensors file, or one whose header is absurd.
    """
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > min(MAX_HEADER_BYTES, path.stat().st_size):
            raise UserError(f"{path}: its header would have {header_bytes:,} bytes. Use another checkpoint.")
        header = file.read(header_bytes)
    try:
        json.loads(header, object_pairs_hook=_without_twins)  # of two entries, the library takes the last
        return load_file(path)
    except (SafetensorError, RecursionError, ValueError, KeyError, RuntimeError, OverflowError) as error:
        raise UserError(f"{path}: not a safetensors file ({error}). Use another checkpoint.") from None


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("it has two entries of one name")
    return entries


def read_state(folder: Path) -> dict[str, Any]:
    """What state.json holds, of this version's format.

    Raises:
        UserError: it is not what this version writes; the version that wrote it is named.
    """
    meta = _read_small_json(folder / STATE)
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        found = meta if isinstance(meta, dict) else {}
        raise UserError(
            f"{folder / STATE}: format {found.get('format')!r}, made by {found.get('made_by')!r}; this "
            f"version reads format {FORMAT}. Go on with the version that made it."
        )
    plan = meta.get("plan")
    if (
        not isinstance(meta.get("fingerprints"), dict)
        or not isinstance(plan, dict)
        or not all(isinstance(plan.get(name), dict) for name in ("args", "model"))
    ):
        raise UserError(f"{folder / STATE}: no fingerprints, or no plan. Use another checkpoint.")
    return meta


def _read_small_json(path: Path) -> Any:
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise UserError(f"{path}: not a plain file. Use another checkpoint.")
    if path.exists() and path.stat().st_size > MAX_JSON_BYTES:
        raise UserError(f"{path}: {path.stat().st_size:,} bytes, far more than it can need. Use another.")
    value = files.read_json(path)
    try:
        json.dumps(value, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:  # NaN, infinity, halves of a surrogate pair
        raise UserError(f"{path}: not a JSON file ({error}). Use another checkpoint.") from None
    return value
