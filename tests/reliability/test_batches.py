"""P2, the data's part: 300 global batches are the same on any ranks, in any process, after any stop."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from nanochat import dataloader
from nanochat.dataset import Corpus
from tests.conftest import REPO
from tests.reliability import record
from tests.test_dataloader import digests, loaders, make, states

STEPS = 300


class OnDemand:
    """In the place of the loader's threads: a block is read, tokenized and packed when its rows are drawn."""

    def __init__(self, *arguments: object, **options: object) -> None:
        pass

    def submit(self, work: Callable[..., Any], *arguments: Any) -> OnDemand.Later:
        return self.Later(work, arguments)

    class Later:
        def __init__(self, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
            self._call: Callable[[], Any] | None = lambda: work(*arguments)
            self._value: Any = None

        def done(self) -> bool:
            return self._call is None

        def result(self) -> Any:
            if self._call is not None:
                self._value, self._call = self._call(), None
            return self._value


def differing(ours: list[str], expected: list[str]) -> int:
    assert len(ours) == len(expected) == STEPS
    return sum(a != b for a, b in zip(ours, expected, strict=True))


def run_process(corpus: Corpus, size: int, state: dict[str, Any] | None = None, steps: int = STEPS) -> Any:
    """The same in processes of their own, which meet on gloo; told by the main rank."""
    command = [sys.executable]
    if size > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}"]
    done = subprocess.run(
        [*command, "tests/dist/loader_script.py", corpus.name, str(steps), json.dumps(state)],
        cwd=REPO,
        env={**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_any_ranks_micro_batch_and_prefetch_give_the_same_300_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    corpus = make(monkeypatch)
    expected = digests(loaders(corpus, 1), STEPS)
    assert len(set(expected)) == STEPS
    wrong = 0
    cases = [(1, 1, 1), (2, 8, 2), (4, 2, 3), (8, 1, 1), (8, 2, 2)]
    for size, micro, threads in cases:
        ranks = loaders(corpus, size, device_batch_size=micro, threads=threads)
        wrong += differing(digests(ranks, STEPS), expected)
    monkeypatch.setattr(dataloader, "ThreadPoolExecutor", OnDemand)
    for size in (1, 4):
        wrong += differing(digests(loaders(corpus, size), STEPS), expected)
    wrong += differing(run_process(corpus, 1)["digests"], expected)
    assert wrong == 0
    record("P2", n=8 * STEPS, failures=wrong, worst=0, unit="global batches, other ranks, threads, process")


@pytest.mark.parametrize("seed", range(5))
def test_stops_at_random_steps_and_other_world_sizes_change_nothing(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    corpus = make(monkeypatch)
    rng = random.Random(seed)
    expected = digests(loaders(corpus, 1), STEPS)
    seen: list[str] = []
    ranks = loaders(corpus, rng.choice((1, 2, 4, 8)))
    stops = 0
    while len(seen) < STEPS:
        seen += digests(ranks, min(rng.randrange(1, 60), STEPS - len(seen)))
        state = states(ranks)[0]
        ranks = loaders(corpus, rng.choice((1, 2, 4, 8)), device_batch_size=rng.choice((1, 2)))
        for loader in ranks:
            loader.load_state_dict(state)
        stops += 1
    wrong = differing(seen, expected)
    assert wrong == 0
    about = f"{stops} stops"
    record("P2", n=STEPS, failures=wrong, worst=0, unit=f"global batches, seed {seed}", note=about)


@pytest.mark.slow
def test_real_ranks_on_gloo_give_the_same_300_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = make(monkeypatch)
    expected = digests(loaders(corpus, 1), STEPS)
    [stopped] = loaders(corpus, 1)
    digests([stopped], 117)
    wrong = 0
    for size in (1, 2, 4, 8):
        wrong += differing(run_process(corpus, size)["digests"], expected)
        resumed = run_process(corpus, size, stopped.state_dict(), steps=STEPS - 117)["digests"]
        wrong += differing(expected[:117] + resumed, expected)
    assert wrong == 0
    record("P2", n=8 * STEPS, failures=wrong, worst=0, unit="global batches on 1, 2, 4, 8 gloo ranks")


def test_planted_a_state_of_the_batch_after_next_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault that peers have: the cursor that is saved is the prefetcher's."""
    corpus = make(monkeypatch)
    expected = digests(loaders(corpus, 1), STEPS)
    ranks = loaders(corpus, 1)
    seen = digests(ranks, 100)
    ahead = loaders(corpus, 1)
    digests(ahead, 101)
    state = states(ahead)[0]
    ranks = loaders(corpus, 1)
    ranks[0].load_state_dict(state)
    assert differing(seen + digests(ranks, STEPS - 100), expected) == STEPS - 100


def test_planted_an_order_that_knows_the_ranks_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = make(monkeypatch)
    expected = digests(loaders(corpus, 1), STEPS)
    ranks = loaders(corpus, 2)
    for loader in ranks:
        loader._mine = list(reversed(loader._mine))
    assert differing(digests(ranks, STEPS), expected) == STEPS
