"""Terminal output: a progress bar for long work, text without control characters, and text as it comes."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

# Cells that are held back at most, until it is known on which line a word stands: Chinese has no spaces.
LONG_WORD = 20


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


class Page:
    """Where a reply is printed: on a terminal wrapped between words, elsewhere as it is.

    What is not of the reply is dim on a terminal. A program that reads the reply finds it on standard error.
    """

    def __init__(self) -> None:
        """Begin at the left edge."""
        self._is_terminal = sys.stdout.isatty()
        self._notes = Console(
            stderr=not self._is_terminal, highlight=False, markup=False, emoji=False, soft_wrap=True
        )
        self._column = 0
        self._held = ""  # the last word so far, with the spaces before it

    def write(self, text: str) -> None:
        """Print the next piece of a reply."""
        pieces = re.findall(r"\n|[^\S\n]+\S*|\S+", self._held + printable(text))
        is_done = pieces[-1] == "\n" or cell_len(pieces[-1]) >= LONG_WORD
        self._held = "" if is_done else pieces.pop()
        for piece in pieces:
            self._place(piece)

    def end_line(self) -> None:
        """Print what is held back, and a line's end unless the line has just begun."""
        self._place(self._held)
        self._held = ""
        if self._column:
            self._place("\n")

    def note(self, text: str) -> None:
        """Print one line that is not of the reply; what could command a terminal is shown as U+FFFD."""
        if self._is_terminal:
            self.end_line()
        self._notes.print("".join(c if c.isprintable() else "\ufffd" for c in text), style="dim")

    def _place(self, piece: str) -> None:
        width = self._notes.width if self._is_terminal else sys.maxsize
        if piece == "\n" or (self._column and self._column + cell_len(piece) > width):
            print()
            piece, self._column = piece.lstrip(), 0
        print(piece, end="", flush=True)
        end = self._column + cell_len(piece)
        self._column = end if end <= width else end % width
