"""Write a trained model for other programs: `python -m scripts.export --run d12 --format hf`."""

from __future__ import annotations

from nanochat import config, errors, export
from nanochat.config import ExportArgs


@errors.cli
def main() -> None:
    """Parse, export."""
    export.run(config.parse(ExportArgs))


if __name__ == "__main__":
    main()
