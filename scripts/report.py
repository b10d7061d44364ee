"""Make the report of a run again: `python -m scripts.report --run d12`."""

from __future__ import annotations

from nanochat.common import errors
from nanochat.config import arguments
from nanochat.report import write_report


@errors.cli
def main() -> None:
    """Make the report of a run again."""
    args = arguments.parse(arguments.ReportArgs)
    print(write_report(args.run))


if __name__ == "__main__":
    main()
