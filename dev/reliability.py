"""reliability.json -> a table for people.

    NANOCHAT_RELIABILITY=reliability.json pytest tests --slow
    python -m dev.reliability reliability.json

With n trials and no failure, the rate of failures is below 3 / n with 95% confidence; the table says so.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

from nanochat import files
from nanochat.errors import UserError, cli

PROMISES = {
    "P1": "A resumed run is the same run, bit for bit",
    "P2": "Any number of ranks continues the same run with the same batches",
    "P3": "A checkpoint is whole or it is not there",
    "P3b": "It survives a power cut, not only a kill",
    "P4": "kill -9 at any moment costs at most the steps since the last save",
    "P5": "A damaged file is found and named before it is used",
    "P6": "A full disk costs nothing but the save",
    "P7": "A loss or gradient that is not finite never reaches the weights",
    "P8": "A signal ends a run cleanly, saved",
    "P9": "A hung or dead rank ends the run with its name",
    "P10": "A download ends whole, or says why",
    "P11": "Opening a hostile checkpoint runs no code",
    "P12": "A hostile archive or shard neither escapes nor explodes",
    "P15": "The tracker cannot hurt the run",
    "P16": "Same seed, same code, same machine: same numbers",
    "P17": "One rank and many are the same optimizer",
    "P18": "A checkpoint of an older release loads",
    "P19": "Resuming with other data, tokenizer or plan is refused",
}


def library_digest(repo: Path) -> str:
    """A hash of what the figures are of: the tracked files of the library, the scripts and the crate."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "nanochat", "scripts", "rustbpe"], cwd=repo, capture_output=True, text=True
    )
    digest = hashlib.sha256()
    for name in sorted(filter(None, listed.stdout.split("\0"))):
        if (repo / name).is_file():
            digest.update(name.encode() + b"\0" + (repo / name).read_bytes() + b"\0")
    return digest.hexdigest()


def trials(entry: dict[str, Any]) -> str:
    """What was tried how often, and the worst that happened."""
    note, worst = str(entry["note"]), float(entry["worst"])
    about = [f"worst {worst:g} {note.removeprefix('worst: ')}".strip()] if worst else []
    if not worst and note and not note.startswith("worst: "):
        about = [note]
    return f"{int(entry['n']):,} {entry['unit']}{''.join(f' ({text})' for text in about)}"


def row(promise: str, entries: list[dict[str, Any]]) -> str:
    """A line of the table: all that was recorded of one promise."""
    n, failures = (sum(int(entry[key]) for entry in entries) for key in ("n", "failures"))
    bound = f"{failures / n:.2%}" if failures else f"< {3 / n:.2%}" if n >= 30 else ""
    tried = "; ".join(sorted(map(trials, entries), key=lambda text: text.split(" ", 1)[1]))
    return f"| {promise} | {PROMISES[promise]} | {n:,} | {failures:,} | {bound} | {tried} |"


def render(entries: list[dict[str, Any]]) -> str:
    """A markdown table with a line for each promise, in their order.

    Raises:
        UserError: an entry lacks a field, or is of no promise.
    """
    try:
        of: dict[str, list[dict[str, Any]]] = {name: [] for name in PROMISES}
        for entry in entries:
            of[entry["promise"]].append(entry)
        lines = ["| | promise | trials | failures | rate (95%) | of what |", "|---|---|---:|---:|---:|---|"]
        lines += [row(promise, of[promise]) for promise in of if of[promise]]
        machines = sorted({entry["machine"] for entry in entries})
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"not figures as tests/reliability records them ({error}).") from None
    return "\n".join([*lines, "", f"Measured on {'; '.join(machines)}."])


@cli
def main() -> None:
    """Print the table of a file."""
    if len(sys.argv) != 2:
        raise UserError("name the file: python -m dev.reliability reliability.json")
    print(render(files.read_json(Path(sys.argv[1]))))


if __name__ == "__main__":
    main()
