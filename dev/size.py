"""Lines of code by folder: no blank lines, no comments, no docstrings.

    python -m dev.size            # a table
    python -m dev.size --write    # keep these numbers in dev/size.json

tests/test_size.py fails where a folder has grown past its number in dev/size.json, so that growth is a
decision which the same commit shows. Lines that the promises added (checksums, locks, refusals) are said
apart: the growth between two commits, counted in the history where it is there.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import re
import subprocess
import tarfile
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "dev" / "size.json"
BEFORE, PROMISED = "f4eb7ef", "126fc43"  # commits: before the promises, and when they were kept
COUNTED = {BEFORE: 9_335, PROMISED: 11_665}  # lines then, for a clone without history
LAYOUT = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def lines_of_code(source: str) -> int:
    r"""Lines of Python that hold code.

    >>> lines_of_code('"What it is."\n\n# why\nx = [\n    1,  # one\n]\n')
    3
    """
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in LAYOUT and token.type != tokenize.COMMENT:
            code.update(range(token.start[0], token.end[0] + 1))
    for docstring in _docstrings(ast.parse(source)):
        code.difference_update(range(docstring.lineno, (docstring.end_lineno or docstring.lineno) + 1))
    return len(code)


def lines_of_page(source: str) -> int:
    r"""Lines of a page, style and script among them, that are neither blank nor comments alone.

    >>> lines_of_page("<!-- What it\n is. -->\n<p>\n\n// why\nsay(1); // one\n")
    2
    """
    kept = re.sub(r"<!--.*?-->", "", source, flags=re.DOTALL)
    return sum(bool(line.strip()) and not line.strip().startswith("//") for line in kept.splitlines())


def _docstrings(tree: ast.Module) -> Iterator[ast.expr]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            value = first.value if isinstance(first, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield value


COUNTS = {".py": lines_of_code, ".html": lines_of_page}


def sizes() -> dict[str, int]:
    """Lines of code of every folder of nanochat/, of its own modules and pages, and of scripts/."""
    found: dict[str, int] = {}
    for top in ("nanochat", "scripts"):
        for path in sorted((ROOT / top).rglob("*.*")):
            if count := COUNTS.get(path.suffix):
                folder = path.parent.relative_to(ROOT).as_posix()
                found[folder] = found.get(folder, 0) + count(path.read_text("utf-8"))
    return found


def lines_at(commit: str) -> int:
    """Lines of code of nanochat/ and scripts/ at a commit, of the history, or as they were counted once."""
    command = ["git", "-C", str(ROOT), "archive", commit, "nanochat", "scripts"]
    archive = subprocess.run(command, capture_output=True)
    if archive.returncode:
        return COUNTED[commit]
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tree:
        members = [member for member in tree if member.name.endswith(".py")]
        return sum(lines_of_code(tree.extractfile(member).read().decode("utf-8")) for member in members)


def main() -> None:
    """Print the table, and keep it where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="keep the numbers in dev/size.json")
    args = parser.parse_args()
    found = sizes()
    for folder, count in found.items():
        print(f"{folder:28}{count:8,d}")
    total, before = sum(found.values()), lines_at(BEFORE)
    promises = lines_at(PROMISED) - before
    print(f"{'in all':28}{total:8,d}")
    print(f"{'the promises added':28}{promises:8,d}   ({BEFORE} to {PROMISED})")
    print(f"{'for what there was':28}{total - promises:8,d}   ({before:,d} at {BEFORE})")
    if args.write:
        KEPT.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
