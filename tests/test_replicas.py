"""The digest of a tensor: equal bits give equal digests, one other bit another; over ranks in tests/dist."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.distributed import weight_check
from nanochat.distributed.weight_check import digest, require_equal
from nanochat.distributed.world import World


def reference(tensor: torch.Tensor) -> int:
    """The weighted sum in Python's integers, one element after another."""
    bits = tensor.reshape(-1).view(torch.int32).tolist()
    total = sum(value * (place * weight_check.ODD * 2 + 1) for place, value in enumerate(bits))
    return (total + (1 << 63)) % (1 << 64) - (1 << 63)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.data())
def test_one_flipped_bit_changes_the_digest(length: int, data: st.DataObject) -> None:
    tensor = torch.randn(length, generator=torch.Generator().manual_seed(length))
    before = digest(tensor)
    assert before.item() == reference(tensor)
    place, bit = data.draw(st.integers(0, length - 1)), data.draw(st.integers(0, 30))
    tensor.view(torch.int32)[place] ^= 1 << bit
    assert digest(tensor).item() == reference(tensor) != before.item()


def test_a_swap_changes_the_digest_and_the_sign_of_zero_too() -> None:
    a = torch.tensor([1.0, 2.0, 3.0])
    assert digest(a) != digest(a.flip(0))
    assert digest(torch.tensor([0.0])) != digest(torch.tensor([-0.0]))


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(7, 11)
    whole = digest(tensor)
    monkeypatch.setattr(weight_check, "CHUNK", 5)
    assert digest(tensor) == whole


def test_alone_there_is_nothing_to_differ_from() -> None:
    require_equal({"a": torch.ones(3), "b": torch.ones(())}, World.single_process(), 1)
