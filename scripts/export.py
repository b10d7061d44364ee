"""Write a trained model for other programs: `python -m scripts.export --run d12 --format hf`."""

from __future__ import annotations

from nanochat import export
from nanochat.common import errors
from nanochat.config import arguments
from nanochat.config.arguments import ExportArgs


@errors.cli
def main() -> None:
    """Parse, export."""
    export.run(arguments.parse(ExportArgs))


if __name__ == "__main__":
    main()
