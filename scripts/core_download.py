"""Fetch the CORE tasks: `python -m scripts.core_download`."""

from __future__ import annotations

from nanochat.common import errors
from nanochat.config import arguments
from nanochat.evaluation.core.download import BUNDLE_URL, fetch, public_files


@errors.cli
def main() -> None:
    """Fetch the CORE tasks."""
    args = arguments.parse(arguments.CoreDownloadArgs)
    folder = fetch(args.url or BUNDLE_URL)
    print(f"{folder}: {len(public_files())} files, all verified")


if __name__ == "__main__":
    main()
