"""P20: ids are tiktoken's, whatever the vocabulary and the text, the cache and the number of threads."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dev import fuzz_ids
from tests.reliability.figures import Figure

UNIT = "random pairs of a vocabulary and a text, half of them tokens"


def check(found: Figure, cases: int, seed: int) -> None:
    outcome = fuzz_ids.fuzz(cases, seed)
    found.checks += outcome["cases"]
    found.failed += [str(case)[:2000] for case in outcome["shown"]]


def test_random_vocabularies_give_the_ids_of_tiktoken(figure: Callable[..., Figure]) -> None:
    check(figure("P20", UNIT + ", in short"), 10_000, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_million_random_cases_give_the_ids_of_tiktoken(figure: Callable[..., Figure]) -> None:
    check(figure("P20", UNIT), 1_000_000, seed=2)


def test_planted_a_wrong_id_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        """Encodes as ours, but for texts of sixteen letters and more."""

        def __init__(self, real: object) -> None:
            self._real = real

        def __getattr__(self, name: str) -> object:
            return getattr(self._real, name)

        def encode(self, text: str) -> list[int]:
            ids = self._real.encode(text)  # type: ignore[attr-defined]
            return [*ids, 0] if len(text) > 15 else ids

    real = fuzz_ids.rustbpe.Tokenizer.from_ranks

    class Module:
        class Tokenizer:
            from_ranks = staticmethod(lambda ranks, pattern: Wrong(real(ranks, pattern)))

    monkeypatch.setattr(fuzz_ids, "rustbpe", Module)
    outcome = fuzz_ids.fuzz(200, seed=3)
    assert outcome["differ"] > 0
    assert outcome["shown"][0]["differing"][0]["way"] == "cold"
