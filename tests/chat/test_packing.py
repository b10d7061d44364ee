"""Packing of conversations: nothing is lost uncounted, and no row is without something to learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from nanochat.chat import packing

END, BOS, OTHER = 3, 1, 7


def conversation_of(turns: list[tuple[int, int]]) -> list[int]:
    """Tokens of turns of so many prompt and reply tokens; negative (~id) where not supervised."""
    tokens = [~BOS]
    for asked, said in turns:
        tokens += [~OTHER] * asked + [OTHER] * said + [END]
    return tokens


def kept_of(tokens: list[int], row_slots: int) -> tuple[int, int]:
    """The slow twin of `fit`, one conversation at a time."""
    length = len(tokens)
    if length > row_slots:
        ends = [at + 1 for at in range(row_slots) if tokens[at] == END]
        length = ends[-1] if ends else row_slots
    return length, sum(token >= 0 for token in tokens[:length])


def joined(conversations: list[list[int]]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    tokens = np.array([token for one in conversations for token in one], np.int32)
    return tokens, np.cumsum([0, *map(len, conversations)])


turn = st.tuples(st.integers(0, 30), st.integers(0, 30))


@given(st.lists(st.lists(turn, min_size=1, max_size=4), max_size=12), st.integers(2, 60))
def test_conversations_end_at_their_last_reply_that_fits(
    turns: list[list[tuple[int, int]]], slots: int
) -> None:
    conversations = [conversation_of(one) for one in turns]
    found = packing.fit(*joined(conversations), slots, END)
    assert list(zip(*(column.tolist() for column in found), strict=True)) == [
        kept_of(one, slots) for one in conversations
    ]


def test_a_reply_that_does_not_fit_is_cut_and_a_prompt_that_fills_the_row_leaves_nothing() -> None:
    whole, second, first, none = ([(3, 4)], [(2, 2), (2, 9)], [(2, 20)], [(20, 3)])
    fitted = packing.fit(*joined([conversation_of(one) for one in (whole, second, first, none)]), 10, END)
    assert fitted.lengths.tolist() == [9, 6, 10, 10]
    assert fitted.supervised.tolist() == [5, 3, 7, 0]


@given(st.lists(st.integers(1, 33), max_size=300), st.integers(0, 5))
def test_rows_hold_each_conversation_once_and_not_too_many(lengths: list[int], seed: int) -> None:
    array = np.array(lengths, np.int64)
    order = np.random.default_rng(seed).permutation(len(array))
    packed = packing.pack(array, order, 33, seed)
    assert sorted(packed.conversations.tolist()) == list(range(len(lengths)))
    rows = [packed.conversations[a:b] for a, b in zip(packed.rows[:-1], packed.rows[1:], strict=True)]
    assert all(0 < len(row) <= 4 and array[row].sum() <= 33 for row in rows)


def test_best_fit_takes_the_longest_that_fits() -> None:
    assert packing.best_fit([30, 10, 60, 25, 5], 65) == [[2, 4], [0, 1, 3]]
    assert packing.best_fit([], 65) == []


def test_blocks_keep_near_what_is_near() -> None:
    order = np.arange(3 * packing.BLOCK)
    packed = packing.pack(np.full(len(order), 20), order, 65, 0)
    blocks = packed.conversations // packing.BLOCK
    assert (np.diff(blocks) >= 0).all()
    assert not (np.diff(packed.conversations) > 0).all(), "rows of a block are shuffled"
    again = packing.pack(np.full(len(order), 20), order, 65, 1)
    assert not np.array_equal(again.conversations, packed.conversations)


# -----------------------------------------------------------------------------
# A million conversations


def random_conversations(count: int, rng: np.random.Generator) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Conversations of one to three turns, prompts and replies of log-normal lengths; some replies empty."""
    turns = rng.integers(1, 4, count)
    pieces = 1 + 3 * turns  # bos, then prompt, reply and end for each turn
    firsts = np.concatenate([[0], np.cumsum(pieces)])
    kind = (np.arange(firsts[-1]) - np.repeat(firsts[:-1], pieces) - 1) % 3
    lengths = np.minimum(rng.lognormal(math.log(30), 1.3, firsts[-1]).astype(np.int64), 9000)
    lengths[kind == 2] = 1
    kind[firsts[:-1]] = 3
    lengths[firsts[:-1]] = 1
    tokens = np.repeat(np.array([~OTHER, OTHER, END, ~BOS], np.int32)[kind], lengths)
    return tokens, np.concatenate([[0], np.cumsum(lengths)])[firsts]


@pytest.mark.slow
@pytest.mark.parametrize("context", [64, 256, 512, 2048])
def test_a_million_conversations_lose_nothing_uncounted(context: int) -> None:
    rng = np.random.default_rng(context)
    whole, lengths, supervised = [], [], []
    for _ in range(20):
        tokens, offsets = random_conversations(50_000, rng)
        fitted = packing.fit(tokens, offsets, context + 1, END)
        whole.append(np.diff(offsets))
        lengths.append(fitted.lengths)
        supervised.append(fitted.supervised)
    total, kept, counts = np.concatenate(whole), np.concatenate(lengths), np.concatenate(supervised)
    used = np.flatnonzero(counts)
    packed = packing.pack(kept, used[rng.permutation(len(used))], context + 1, 0)
    in_rows = np.add.reduceat(kept[packed.conversations], packed.rows[:-1])
    learnt = np.add.reduceat(counts[packed.conversations], packed.rows[:-1])
    cut = (total - kept)[used].sum()
    dropped = total[counts == 0].sum()
    assert in_rows.sum() + cut + dropped == total.sum()
    assert in_rows.max() <= context + 1
    assert learnt.min() >= 1, "no row is without a supervised token"
    assert np.array_equal(np.sort(packed.conversations), used)
    assert np.diff(packed.rows).max() <= context // 8
    print(
        f"T = {context}: {len(in_rows)} rows, fill {in_rows.sum() / len(in_rows) / (context + 1):.2%}, "
        f"{np.count_nonzero((total > kept) & (counts > 0))} cut, {np.count_nonzero(counts == 0)} dropped"
    )


# -----------------------------------------------------------------------------
# The peer


def peer_rows(lengths: NDArray[np.int64], row_slots: int) -> list[list[int]]:
    """karpathy/nanochat's packer, from its description: a buffer of 100 rendered conversations, of which the
    longest that fits goes into the row; where none fits, the rest of the row is padding. None is cropped."""
    stream, buffer, rows = iter(lengths.tolist()), [], []
    while True:
        row, space = [], row_slots
        while space:
            while len(buffer) < 100:
                try:
                    buffer.append(next(stream))
                except StopIteration:
                    return rows
            fitting = [length for length in buffer if length <= space]
            if not fitting:
                break
            row.append(max(fitting))
            buffer.remove(max(fitting))
            space -= row[-1]
        rows.append(row)
        if len(rows) > 5000:
            return rows


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_peers_packer_is_left_with_nothing_to_learn(seed: int) -> None:
    """Its mean over the supervised targets of a micro-batch is 0 / 0 from the k-th on, for ever."""
    rng = np.random.default_rng(seed)
    lengths = np.maximum(rng.lognormal(math.log(900), 0.8, 100_000).astype(np.int64), 20)
    rows = peer_rows(lengths, 513)
    batches = [rows[at : at + 32] for at in range(0, len(rows) - 31, 32)]
    dead = next(k for k, batch in enumerate(batches) if not any(batch))
    assert all(not any(batch) for batch in batches[dead:])
    assert dead < 10
    print(f"seed {seed}: from micro-batch {dead} on all targets are -1 and the loss is NaN")
    # Ours, of the same lengths, each with a prompt of a third: all rows teach something.
    tokens, offsets = joined([conversation_of([(n // 3, n - n // 3 - 2)]) for n in lengths[:2000].tolist()])
    fitted = packing.fit(tokens, offsets, 513, END)
    packed = packing.pack(fitted.lengths, np.flatnonzero(fitted.supervised), 513, seed)
    assert np.add.reduceat(fitted.supervised[packed.conversations], packed.rows[:-1]).min() >= 1
