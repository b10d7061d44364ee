"""Faults that were found in this program or in others, each tried again through the doors that users take.

    python -m dev.faults                 # every row; PASS, FAIL or SKIP, and the reason
    python -m dev.faults T6 A16          # some of them
    python -m dev.faults --jobs 2 --json faults.json

A row is one function in `dev/fault_rows/`, with what was tried and what is wanted. It runs real commands in a
base directory of its own (`dev/fault_box.py`) and fails by an AssertionError. Rows T1 to T104 are attacks on
the promises, A1 to E19 are troubles of other people's users.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dev import fault_rows
from dev.fault_box import ROOT, ROWS, Box, Row, Skip


def load_rows() -> list[Row]:
    """Every row of every module in dev/fault_rows, by number."""
    for module in pkgutil.iter_modules(fault_rows.__path__):
        importlib.import_module(f"dev.fault_rows.{module.name}")
    return sorted(ROWS.values(), key=lambda row: _order(row.id))


def _order(name: str) -> tuple[str, int]:
    found = re.fullmatch(r"([A-Z])(\d+)[a-z]?", name)
    assert found, f"{name}: a row is named by a letter and a number"
    return found[1], int(found[2])


def try_row(row: Row, folder: Path) -> dict[str, Any]:
    """Run one row in a folder of its own; the verdict, the reason and the seconds."""
    began, verdict, reason = time.monotonic(), "PASS", ""
    box = Box(folder)
    try:
        row.function(box)
    except Skip as skipped:
        verdict, reason = "SKIP", str(skipped)
    except Exception as error:  # whatever it is, the other rows are still tried
        verdict, reason = "FAIL", f"{type(error).__name__}: {error}"
        if not isinstance(error, AssertionError):
            reason += "\n" + traceback.format_exc(limit=-3)
    finally:
        box.close()
    seconds = round(time.monotonic() - began, 1)
    return {"id": row.id, "what": row.what, "verdict": verdict, "reason": reason, "seconds": seconds}


def heed_signals() -> None:
    """Ignore no signal: below nohup or in the background, commands would inherit that some are ignored."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def main() -> None:
    """Try the rows that are named, by default all; exit code 1 where one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("rows", nargs="*", help="names of rows, such as T6 or A16; by default all")
    parser.add_argument("--jobs", type=int, default=1, help="rows that are tried at once")
    parser.add_argument("--json", type=Path, help="also write the verdicts, with the commit, to this file")
    args = parser.parse_args()
    rows = load_rows()
    if unknown := set(args.rows) - {row.id for row in rows}:
        parser.error(f"no such rows: {', '.join(sorted(unknown))}")
    chosen = [row for row in rows if not args.rows or row.id in args.rows]
    heed_signals()
    results = []
    with tempfile.TemporaryDirectory(prefix="faults-") as scratch, ThreadPoolExecutor(args.jobs) as pool:
        for result in pool.map(lambda row: try_row(row, Path(scratch) / row.id), chosen):
            results.append(result)
            print(f"{result['verdict']} {result['id']:5} {result['seconds']:6.1f} s  {result['what']}")
            if result["reason"]:
                print("     " + result["reason"].replace("\n", "\n     "))
            sys.stdout.flush()
    counts = {kind: sum(r["verdict"] == kind for r in results) for kind in ("PASS", "FAIL", "SKIP")}
    print(f"{counts['PASS']} passed, {counts['FAIL']} failed, {counts['SKIP']} skipped")
    if args.json:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        args.json.write_text(json.dumps({"commit": commit.stdout.strip(), "rows": results}, indent=1) + "\n")
    sys.exit(1 if counts["FAIL"] else 0)


if __name__ == "__main__":
    main()
