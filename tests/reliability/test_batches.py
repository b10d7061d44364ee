"""P2, the data's part: 300 global batches are the same on any ranks, in any process, after any stop."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from nanochat.data import train_loader
from nanochat.data.corpus import Corpus
from tests.conftest import REPO
from tests.reliability.figures import Figure
from tests.test_dataloader import digests, loaders, make, states

STEPS = 300


class OnDemand:
    """In the place of the loader's threads: a block is read, tokenized and packed when it is asked for."""

    def __init__(self, *arguments: object, **options: object) -> None:
        pass

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(work(*arguments))
        return done


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
    monkeypatch: pytest.MonkeyPatch, figure: Callable[..., Figure]
) -> None:
    configurations = figure("P2", "numbers of ranks, micro-batches, threads, processes: 300 batches each")
    corpus = make(monkeypatch)
    expected = digests(loaders(corpus, 1), STEPS)
    assert len(set(expected)) == STEPS
    cases = [(1, 1, 1), (2, 8, 2), (4, 2, 3), (8, 1, 1), (8, 2, 2)]
    for size, micro, threads in cases:
        ranks = loaders(corpus, size, device_batch_size=micro, threads=threads)
        with configurations.trial((size, micro, threads)):
            assert differing(digests(ranks, STEPS), expected) == 0
    monkeypatch.setattr(train_loader, "ThreadPoolExecutor", OnDemand)
    for size in (1, 4):
        with configurations.trial(f"{size} ranks without threads"):
            assert differing(digests(loaders(corpus, size), STEPS), expected) == 0
    with configurations.trial("another process"):
        assert differing(run_process(corpus, 1)["digests"], expected) == 0


@pytest.mark.parametrize("seed", range(5))
def test_stops_at_random_steps_and_other_world_sizes_change_nothing(
    monkeypatch: pytest.MonkeyPatch, seed: int, figure: Callable[..., Figure]
) -> None:
    stopped = figure("P2", f"stops at random steps and changes of world size, seed {seed}")
    corpus = make(monkeypatch)
    rng = random.Random(seed)
    expected = digests(loaders(corpus, 1), STEPS)
    seen: list[str] = []
    ranks = loaders(corpus, rng.choice((1, 2, 4, 8)))
    while len(seen) < STEPS:
        part = digests(ranks, min(rng.randrange(1, 60), STEPS - len(seen)))
        with stopped.trial(f"batches {len(seen)} to {len(seen) + len(part)}"):
            assert part == expected[len(seen) :][: len(part)]
        seen += part
        state = states(ranks)[0]
        ranks = loaders(corpus, rng.choice((1, 2, 4, 8)), device_batch_size=rng.choice((1, 2)))
        for loader in ranks:
            loader.load_state_dict(state)
    assert differing(seen, expected) == 0


@pytest.mark.slow
def test_real_ranks_on_gloo_give_the_same_300_batches(
    monkeypatch: pytest.MonkeyPatch, figure: Callable[..., Figure]
) -> None:
    started = figure("P2", "starts of 1, 2, 4, 8 gloo ranks, anew and after 117 batches: 300 batches each")
    corpus = make(monkeypatch)
    expected = digests(loaders(corpus, 1), STEPS)
    [stopped] = loaders(corpus, 1)
    digests([stopped], 117)
    for size in (1, 2, 4, 8):
        with started.trial(f"{size} ranks"):
            assert differing(run_process(corpus, size)["digests"], expected) == 0
        with started.trial(f"{size} ranks go on"):
            resumed = run_process(corpus, size, stopped.state_dict(), steps=STEPS - 117)["digests"]
            assert differing(expected[:117] + resumed, expected) == 0


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
