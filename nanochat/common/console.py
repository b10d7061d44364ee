"""Standard output and error: streams whose writes cannot fail, so that a terminal that is gone ends no work.

A log file on a full disk, a reader that has left the pipe, a terminal that was closed, an encoding without
the letters that are printed: each would raise into whatever computes and happens to print. So the streams of
the process are replaced, once, by streams whose writes cannot fail; print, rich and argparse all go there.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from typing import Any, TextIO

READER_IS_GONE = (errno.EPIPE, errno.ESHUTDOWN, errno.ECONNRESET)


class Sink(io.FileIO):
    """A descriptor that takes all that is written to it; what it cannot write is dropped, and said once."""

    def __init__(self, descriptor: int, name: str) -> None:
        """`name` is what a message calls it."""
        super().__init__(descriptor, "wb", closefd=False)
        self.called = name
        self.error: OSError | None = None  # the first one

    def write(self, data: Any) -> int:
        """Write all of it, or none where nothing can be written any more."""
        left = memoryview(data).cast("B")
        size = len(left)
        while len(left) and not self.reader_is_gone():
            try:
                written = super().write(left)
                if written is None:  # another program has set it to return instead of waiting
                    select.select([], [self], [])
            except OSError as error:
                self._lose(error)
                break
            left = left[written or 0 :]
        return size

    def reader_is_gone(self) -> bool:
        """Whether nobody can read what is written."""
        return self.error is not None and self.error.errno in READER_IS_GONE

    def _lose(self, error: OSError) -> None:
        is_first, self.error = self.error is None, self.error or error
        if is_first and self.called == "standard output" and not self.reader_is_gone():
            text = f"warning: {self.called}: {error.strerror}; going on without it"
            print(text, file=sys.stderr, flush=True)


def install() -> None:
    """Replace the streams of this process. Streams that are not the interpreter's own are left alone."""
    _open_closed_descriptors()
    if sys.stderr is sys.__stderr__:
        sys.stderr = _replaced(sys.stderr, 2, "standard error", "backslashreplace")
    if sys.stdout is sys.__stdout__:
        sys.stdout = _replaced(sys.stdout, 1, "standard output", "replace")


def _open_closed_descriptors() -> None:
    """Put nothing where the shell has closed a standard stream: the next file opened would be it."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)


def _replaced(old: TextIO | None, descriptor: int, name: str, errors: str) -> TextIO:
    sink = Sink(descriptor, name)
    unbuffered = isinstance(old, io.TextIOWrapper) and old.write_through  # python -u
    encoding = getattr(old, "encoding", None) or "utf-8"
    return io.TextIOWrapper(
        sink if unbuffered else io.BufferedWriter(sink),
        encoding=encoding,
        errors=errors,
        newline=None if os.name == "nt" else "\n",
        line_buffering=sink.isatty() or name == "standard error",
        write_through=unbuffered,
    )


def trouble() -> OSError | None:
    """Why standard output could not be written, if it could not; a reader who has left has enough."""
    sink = _sink_of(sys.stdout)
    return None if sink is None or sink.reader_is_gone() else sink.error


def reader_is_gone() -> bool:
    """Whether nobody reads standard output any more, as after `| head`."""
    sink = _sink_of(sys.stdout)
    return sink is not None and sink.reader_is_gone()


def _sink_of(stream: Any) -> Sink | None:
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)
    return raw if isinstance(raw, Sink) else None
