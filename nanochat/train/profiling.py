"""What surrounds the steps of a loop: the garbage collector held still, a trace where one is asked for."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from pathlib import Path

from nanochat.common import files
from nanochat.common.errors import warn

TRACE_AFTER, TRACE_WARMUP, TRACED = 2, 1, 3  # steps


@contextlib.contextmanager
def collector_held() -> Iterator[None]:
    """Within, garbage is collected only on call: what is there already is not looked at again.

    A collection in the middle of a step costs about half a second with a large model's objects about.
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
    """Within, steps are traced by torch.profiler, if a path is given; what is yielded is called after each.

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

    steps = schedule(wait=TRACE_AFTER, warmup=TRACE_WARMUP, active=TRACED, repeat=1)
    with profile(schedule=steps, on_trace_ready=write) as profiler:
        yield profiler.step
