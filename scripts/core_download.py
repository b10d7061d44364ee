"""Fetch the CORE tasks: `python -m scripts.core_download`."""

from __future__ import annotations

from nanochat.common import errors
from nanochat.config import arguments
from nanochat.evaluation.core.download import BUNDLE_URL, SHA256, fetch


@errors.cli
def main() -> None:
    """Fetch the CORE tasks."""
    args = arguments.parse(arguments.CoreDownloadArgs)
    folder = fetch(args.url or BUNDLE_URL)
    print(f"{folder}: {len(SHA256)} files, all verified")


if __name__ == "__main__":
    main()
