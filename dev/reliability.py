"""reliability.json -> docs/reliability.md, a table for people.

    NANOCHAT_RELIABILITY=reliability.json pytest tests --slow
    python -m dev.reliability reliability.json

With n independent trials and no failure, the rate of failures is below 3 / n with 95% confidence.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

from nanochat.common import files
from nanochat.common.errors import UserError, cli

HEAD = """# Reliability: what was tried, and how often it failed

Every line is a promise of the README. The figures are written by the tests of `tests/reliability` when they
end, failures included, with the commit they were run at; CI fails where they are of another
library than the one beside them. Faults are injected for real: processes are killed, disks are full, bits are
flipped in files.

A trial is independent of the others, or it is not counted: many checks of one deterministic order are one
trial. With n trials and no failure the rate is below 3 / n with 95 % confidence; below 30 trials no
bound is claimed.

```bash
rm -f reliability.json
NANOCHAT_RELIABILITY=reliability.json bash runs/test.sh --slow
.venv/bin/python -m dev.reliability reliability.json
```
"""

ENOUGH = 30  # trials without failure, from which on 3 / n says something

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
    "P20": "Ids are tiktoken's for the same ranks and pattern",
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


def bound(n: int, failures: int) -> str:
    """The rate of failures with 95 % confidence: measured, below 3 / n, or too few trials to say."""
    if failures:
        return f"{failures / n:.2%}"
    return f"< {3 / n:.2%}" if n >= ENOUGH else "too few to bound"


def setting(entry: dict[str, Any]) -> str:
    """What was tried how often, and the worst that happened."""
    n, checks = int(entry["n"]), int(entry.get("checks", entry["n"]))
    many = f"{n:,} {entry['unit']}" + (f", {checks:,} checks of one order" if checks > n else "")
    worst = float(entry["worst"])
    return many + (f" (worst {worst:g} {entry['note']})" if worst else "")


def row(promise: str, entries: list[dict[str, Any]]) -> str:
    """A line of the table: all that was recorded of one promise."""
    n, failures = (sum(int(entry[key]) for entry in entries) for key in ("n", "failures"))
    tried = "; ".join(sorted(map(setting, entries), key=lambda text: text.split(" ", 1)[1]))
    return f"| {promise} | {PROMISES[promise]} | {n:,} | {failures:,} | {bound(n, failures)} | {tried} |"


def render(entries: list[dict[str, Any]]) -> str:
    """A markdown table with a line for each promise, in their order.

    Raises:
        UserError: an entry lacks a field, or is of no promise.
    """
    try:
        of: dict[str, list[dict[str, Any]]] = {name: [] for name in PROMISES}
        for entry in entries:
            of[entry["promise"]].append(entry)
        lines = [
            "| | promise | independent trials | failures | rate (95%) | of what |",
            "|---|---|---:|---:|---:|---|",
        ]
        lines += [row(promise, of[promise]) for promise in of if of[promise]]
        machines = sorted({entry["machine"] for entry in entries})
        commits = sorted({str(entry["commit"])[:7] for entry in entries})
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"not figures as tests/reliability records them ({error}).") from None
    return "\n".join([*lines, "", f"Measured on {'; '.join(machines)}, at {', '.join(commits)}."])


def page(entries: list[dict[str, Any]]) -> str:
    """docs/reliability.md: how the figures come about, and the table."""
    return f"{HEAD}\n{render(entries)}\n"


@cli
def main() -> None:
    """Write docs/reliability.md from a file of figures."""
    if len(sys.argv) != 2:
        raise UserError("name the file: python -m dev.reliability reliability.json")
    path = Path(__file__).resolve().parents[1] / "docs" / "reliability.md"
    files.atomic_write(path, page(files.read_json(Path(sys.argv[1]))))
    print(f"written: {path}")


if __name__ == "__main__":
    main()
