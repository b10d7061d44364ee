"""reliability.json -> a table for people.

    NANOCHAT_RELIABILITY=reliability.json pytest tests --slow
    python -m dev.reliability reliability.json

With n trials and no failure, the rate of failures is below 3 / n with 95% confidence; the table says so.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from nanochat import files
from nanochat.errors import UserError, cli


def row(entry: dict[str, Any]) -> str:
    """A line of the table."""
    n, failures = int(entry["n"]), int(entry["failures"])
    bound = f"{failures / n:.2%}" if failures else f"< {3 / n:.1%}" if n >= 30 else ""
    worst = f"{entry['worst']:g}" if entry["worst"] else ""
    cells = (entry["promise"], entry["unit"], f"{n:,}", f"{failures:,}", bound, worst, entry["note"])
    return f"| {' | '.join(cells)} |"


def render(entries: list[dict[str, Any]]) -> str:
    """A markdown table, in the order of the promises.

    Raises:
        UserError: an entry lacks a field.
    """
    head = "| promise | trials of | n | failures | rate (95%) | worst | note |"
    try:
        ordered = sorted(entries, key=lambda e: (int(e["promise"].strip("Pb")), e["promise"], e["unit"]))
        lines = [head, "|---|---|---:|---:|---:|---:|---|", *map(row, ordered)]
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
