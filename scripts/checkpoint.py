"""List, verify or prune the checkpoints of a run: `python -m scripts.checkpoint verify --run d12`."""

from __future__ import annotations

from pathlib import Path

from nanochat.checkpoint import format as checkpoint_format
from nanochat.checkpoint.state import require_run
from nanochat.common import errors, files
from nanochat.common.errors import UserError
from nanochat.config import arguments
from nanochat.config.arguments import CheckpointArgs


@errors.cli
def main() -> None:
    """List, verify or prune the checkpoints of a run."""
    args = arguments.parse(CheckpointArgs)
    require_run(args.run)
    if args.keep_last < 1:
        raise UserError(f"--keep-last={args.keep_last}: expected 1 or more.")
    steps = checkpoint_format.steps_of(args.run)
    whole = [step for step in steps if args.do == "list" or _is_whole(args.run, step)]
    if args.do == "prune":
        for step in checkpoint_format.prune(args.run, whole, args.keep_last, args.keep_every):
            print(f"deleted step {step}")
        return
    for step in whole:
        print(f"step {step:7,d}  {_bytes_of(checkpoint_format.folder_of(args.run, step)):15,d} bytes")
    if (aside := files.checkpoints_dir(args.run) / checkpoint_format.ABANDONED).is_dir():
        print(f"{aside}: {len(list(aside.iterdir()))} that the run has left, {_bytes_of(aside):,} bytes")
    if damaged := len(steps) - len(whole):
        raise UserError(f"{damaged} of {len(steps)} checkpoints are damaged. --resume=auto passes them over.")


def _is_whole(run: str, step: int) -> bool:
    try:
        checkpoint_format.verify(checkpoint_format.folder_of(run, step))
    except UserError as error:
        print(error)
        return False
    return True


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
