"""Profiler trace and garbage collection around the steps of the loop.

A collection in the middle of a step costs half a second, which a trace would show.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from pathlib import Path

from nanochat.common import files
from nanochat.common.errors import warn


@contextlib.contextmanager
def collector_held() -> Iterator[None]:
    """Within, garbage is collected on call alone, and objects that exist already are left out.

    A collection costs about half a second beside the objects of a large model.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


@contextlib.contextmanager
def traced(path: Path | None) -> Iterator[Callable[[], None]]:
    """Within, torch.profiler traces steps, if a path is given; the function that it yields ends a step.

    Two steps and one of warm-up pass by; the three after them are in the trace.
    """
    if path is None:
        yield lambda: None
        return
    from torch.profiler import profile, schedule  # 0.3 s that no other run pays

    def write(profiler: profile) -> None:
        try:
            with files.atomic_path(path) as temporary:
                profiler.export_chrome_trace(str(temporary))
        except OSError as error:  # a full disk costs the trace, not the run
            warn(f"{path} could not be written ({error.strerror}); the run goes on without it")

    steps = schedule(wait=2, warmup=1, active=3, repeat=1)
    with profile(schedule=steps, on_trace_ready=write) as profiler:
        yield profiler.step
