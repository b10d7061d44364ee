"""What a command makes of the machine before it trains: questions to a pretended H100."""

from __future__ import annotations

from typing import Any

import torch

from nanochat.distributed import world


def allocator() -> dict[str, Any]:
    """The device that a command joins on, and how CUDA's allocator was set up when it started."""
    with world.join("auto") as ranks:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        settings = torch.cuda.memory._snapshot()["allocator_settings"]
        return {"device": str(ranks.device), "grows": settings["expandable_segments"]}
