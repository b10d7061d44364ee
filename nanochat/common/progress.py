"""Terminal output: a progress bar for work that takes long, and text without control characters."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn


@contextlib.contextmanager
def bytes_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show `what` as a bar of `total` bytes; yields a function that is told how many are done.

    What is printed meanwhile appears above the bar. The function may be called by any thread.
    """
    if not sys.stdout.isatty():
        yield lambda done: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)


def printable(text: str) -> str:
    """Text that a model or a file has written, without what would command a terminal.

    On a terminal, control characters but newline and tab become U+FFFD: an escape sequence could rename the
    window or overwrite the lines above. Elsewhere the text is as it is, for programs.
    """
    if sys.stdout is None or not sys.stdout.isatty():
        return text
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)
