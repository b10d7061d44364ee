"""Packing: rows are full and start with BOS; each token is in one row at most; best-fit as spelled out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.data.packing import Packed, pack, shuffled

BOS = 1_000_000

lengths_of_documents = st.lists(st.integers(1, 40), max_size=40)
slots = st.integers(2, 24)


def pack_lengths(lengths: list[int], row_slots: int, keep_tails: bool) -> Packed:
    """Pack documents whose tokens are all different: token = its place in the block."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = np.arange(offsets[-1], dtype=np.uint32)
    return pack(ids, offsets, bos_id=BOS, row_slots=row_slots, keep_tails=keep_tails)


def spans(packed: Packed) -> list[list[int]]:
    """The runs of tokens between BOS, without what fills the last row."""
    stream = packed.rows.reshape(-1).tolist()
    stream = stream[: len(stream) - packed.filled]
    found: list[list[int]] = []
    for token in stream:
        if token == BOS:
            found.append([])
        else:
            found[-1].append(token)
    return found


def best_fit_slowly(lengths: list[int], row_slots: int, keep_tails: bool) -> list[list[int]]:
    """The rule, word for word, with a scan over all documents for each placement."""
    documents = []
    for length in lengths:
        first = sum(len(d) - 1 for d in documents)
        documents.append([BOS, *range(first, first + length)])
    rows: list[list[int]] = []
    while documents:
        row: list[int] = []
        while documents and len(row) < row_slots:
            space = row_slots - len(row)
            fitting = [d for d in documents if len(d) <= space]
            if fitting:
                longest = max(len(d) for d in fitting)
                chosen = [d for d in fitting if len(d) == longest][-1]
                documents.remove(chosen)
                row += chosen
            elif space == 1:
                row.append(BOS)
            else:
                length = (max if keep_tails else min)(len(d) for d in documents)
                same = [d for d in documents if len(d) == length]
                chosen = same[-1 if keep_tails else 0]
                documents.remove(chosen)
                row += chosen[:space]
                if keep_tails:
                    documents.append([BOS, *chosen[space:]])
        if len(row) == row_slots or keep_tails:
            rows.append(row)
    return rows


@given(lengths_of_documents, slots, st.booleans())
def test_every_row_is_full_and_starts_with_bos(lengths: list[int], row_slots: int, keep_tails: bool) -> None:
    packed = pack_lengths(lengths, row_slots, keep_tails)
    assert packed.rows.shape[1] == row_slots
    assert (packed.rows[:, 0] == BOS).all()
    assert 0 <= packed.filled < row_slots


@given(lengths_of_documents, slots, st.booleans())
def test_tokens_come_in_spans_of_one_document_and_none_twice(
    lengths: list[int], row_slots: int, keep_tails: bool
) -> None:
    found = spans(pack_lengths(lengths, row_slots, keep_tails))
    starts = np.concatenate([[0], np.cumsum(lengths)])
    for span in found:
        assert span == list(range(span[0], span[0] + len(span))) if span else True
        documents = np.searchsorted(starts, span, side="right")
        assert len(set(documents.tolist())) <= 1
    tokens = [token for span in found for token in span]
    assert len(tokens) == len(set(tokens))


@given(lengths_of_documents, slots)
def test_with_tails_kept_no_token_is_lost_and_the_fill_repeats_the_beginning(
    lengths: list[int], row_slots: int
) -> None:
    packed = pack_lengths(lengths, row_slots, keep_tails=True)
    assert sorted(token for span in spans(packed) for token in span) == list(range(sum(lengths)))
    stream = packed.rows.reshape(-1)
    real = stream[: len(stream) - packed.filled]
    assert stream[len(real) :].tolist() == np.resize(real, packed.filled).tolist()


@settings(max_examples=200)
@given(lengths_of_documents, slots)
def test_rows_equal_the_rule_spelled_out(lengths: list[int], row_slots: int) -> None:
    assert pack_lengths(lengths, row_slots, False).rows.tolist() == best_fit_slowly(lengths, row_slots, False)


@settings(max_examples=200)
@given(lengths_of_documents, slots)
def test_rows_with_tails_equal_the_rule_spelled_out(lengths: list[int], row_slots: int) -> None:
    packed = pack_lengths(lengths, row_slots, True)
    slow = [token for row in best_fit_slowly(lengths, row_slots, True) for token in row]
    stream = packed.rows.reshape(-1)
    assert stream[: len(stream) - packed.filled].tolist() == slow


def test_a_worked_example() -> None:
    # Rows of 6 slots; documents take 4, 3 and 9. First row: 4 fits best, then nothing fits 2: the shortest
    # that is left (3) is cropped to 2. Second row: 9 does not fit and is cropped to 6.
    packed = pack_lengths([3, 2, 8], row_slots=6, keep_tails=False)
    assert packed.rows.tolist() == [[BOS, 0, 1, 2, BOS, 3], [BOS, 5, 6, 7, 8, 9]]


def test_a_block_shorter_than_a_row_gives_a_row_only_with_tails() -> None:
    assert len(pack_lengths([3], row_slots=10, keep_tails=False).rows) == 0
    packed = pack_lengths([3], row_slots=10, keep_tails=True)
    assert packed.rows.tolist() == [[BOS, 0, 1, 2, BOS, 0, 1, 2, BOS, 0]]
    assert packed.filled == 6


@pytest.mark.parametrize("key", [(0,), (0, 1), (7, 3, 2)])
def test_a_shuffle_is_a_permutation_fixed_by_its_key(key: tuple[int, ...]) -> None:
    assert sorted(shuffled(100, *key).tolist()) == list(range(100))
    assert shuffled(100, *key).tolist() == shuffled(100, *key).tolist()
    assert shuffled(100, *key).tolist() != shuffled(100, *key, 1).tolist()


def test_the_shuffle_is_the_one_that_earlier_runs_used() -> None:
    assert shuffled(8, 0, 0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]
