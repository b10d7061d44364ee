"""Errors of users: one line on standard error, and exit code 2."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

from nanochat.common import console


class UserError(ValueError):
    """A mistake in what the user gave: a flag, a file, a name.

    The message names the file or flag, the value, what was expected and what to do about it.
    """


def cli(main: Callable[[], None]) -> Callable[[], None]:
    """Wrap a script's `main`: a user's mistake or an error of the system becomes one line and exit code 2.

    Everything else is our mistake and keeps its traceback. What is printed cannot end the work: where it
    could not be written, the exit code says so after the work. A reader who has left, as `| head` does, has
    enough.
    """

    @functools.wraps(main)
    def wrapped() -> None:
        console.install()
        try:
            main()
        except UserError as error:
            _leave(str(error))
        except (BrokenPipeError, KeyboardInterrupt):
            sys.exit(130)
        except OSError as error:
            _leave(describe_os_error(error))
        except MemoryError:
            _leave("memory ran out. Take a smaller --device-batch-size, or end other programs.")
        sys.stdout.flush()
        if lost := console.trouble():
            _leave(
                f"standard output could not be written ({lost.strerror}); everything else is done. "
                "Free some space, or send the output elsewhere."
            )

    return wrapped


def warn(text: str) -> None:
    """Say on standard error what went wrong and did not end the work."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def describe_os_error(error: OSError) -> str:
    """Say what the operating system refused, and on which file."""
    where = f"{error.filename}: " if error.filename else ""
    reason = error.strerror or str(error)
    return f"{where}{reason}. Check the path, its permissions and the free space, then run again."


def _leave(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
