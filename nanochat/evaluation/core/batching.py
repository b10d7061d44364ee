"""Batches of CORE: which tokens are computed, and together with which others. Pure arithmetic on token ids.

Rows that begin with the same tokens form a prefix group: the shared prefix is computed once, and each row
goes on from it. Options of one example are such rows, and so are the questions about one story. Groups of
about the same size form a batch. Both choices minimize the tokens computed, padding included, where a forward
pass counts as `overhead` tokens more and a shared token that is copied for a row as 1 / `COPIES_PER_TOKEN`.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]

# Copying the keys and values of a position of all layers, against computing them (depth 4, CPU).
COPIES_PER_TOKEN = 16
MIN_SHARED = 24  # tokens; less is not worth a second forward pass
MAX_GROUP_ROWS = 64  # rows


@dataclass(frozen=True, eq=False)
class Span:
    """A token sequence whose end is scored; equal only to itself, so that it can be the key of its score.

    Attributes:
        ids: (T,) int32; BOS first, unless it was cropped with the beginning.
        start: first scored token, at least 1; T where nothing is scored.
        cropped: whether tokens were cut off at the left.
    """

    ids: Ids
    start: int
    cropped: bool = False


@dataclass
class Row:
    """The inputs of one row of a forward pass.

    Attributes:
        ids: its tokens, with which no other row begins.
        spans: what is scored from it: these tokens or a beginning of them, and one target more.
        first_scored: the first position whose output is needed.
    """

    ids: Ids
    spans: list[Span]
    first_scored: int


@dataclass(frozen=True)
class PrefixGroup:
    """Rows that begin with the same tokens.

    Attributes:
        shared: length of the prefix that is computed once; 0 for one row.
        rows: the rows.
        longest: tokens of the longest of them.
    """

    shared: int
    rows: tuple[Row, ...]
    longest: int


def rows_of(spans: Sequence[Span]) -> list[Row]:
    """The distinct rows that must be read to score spans, in lexicographic order."""
    # The last token of a span is only ever a target. Big-endian bytes sort like the numbers.
    keys = {span: span.ids[:-1].astype(">i4").tobytes() for span in spans}
    rows: list[Row] = []
    for span in sorted(spans, key=keys.__getitem__, reverse=True):
        # What begins another row sorts directly before those that it begins.
        if not rows or not keys[rows[-1].spans[0]].startswith(keys[span]):
            rows.append(Row(span.ids[:-1], [], span.start - 1))
        rows[-1].spans.append(span)
        rows[-1].first_scored = min(rows[-1].first_scored, span.start - 1)
    return rows[::-1]


def prefix_groups(rows: Sequence[Row], overhead: int, batch_tokens: int) -> list[PrefixGroup]:
    """Cut sorted rows into groups at the least cost."""
    lengths = [len(row.ids) for row in rows]
    common = [0] + [common_prefix([one.ids, two.ids]) for one, two in itertools.pairwise(rows)]
    # Of the first so many rows: the least cost; where the last group begins, and how much it shares.
    best, cuts = [0.0], [(0, 0)]
    for end in range(1, len(rows) + 1):
        begin = end - 1
        cost, cut = best[begin] + lengths[begin] + overhead, (begin, 0)
        longest, limit = lengths[begin], rows[begin].first_scored
        while begin > 0 and end - begin < MAX_GROUP_ROWS:
            limit = min(limit, common[begin], rows[begin - 1].first_scored)
            begin -= 1
            longest, size = max(longest, lengths[begin]), end - begin
            if limit < MIN_SHARED or size * longest > batch_tokens:
                break
            computed = limit + size * (longest - limit) + size * limit / COPIES_PER_TOKEN
            if best[begin] + computed + 2 * overhead < cost:
                cost, cut = best[begin] + computed + 2 * overhead, (begin, limit)
        best.append(cost)
        cuts.append(cut)
    groups = []
    end = len(rows)
    while end:
        begin, shared = cuts[end]
        groups.append(PrefixGroup(shared, tuple(rows[begin:end]), max(lengths[begin:end])))
        end = begin
    return groups


def common_prefix(rows: Sequence[NDArray[np.int32]]) -> int:
    """Number of tokens that all rows begin with."""
    shortest = min(map(len, rows))
    differs = np.zeros(shortest, dtype=bool)
    for row in rows[1:]:
        differs |= row[:shortest] != rows[0][:shortest]
    return int(differs.argmax()) if differs.any() else shortest


def batches(groups: Sequence[PrefixGroup], overhead: int, batch_tokens: int) -> list[list[PrefixGroup]]:
    """Put groups that share something, and single rows, into batches at the least cost.

    Args:
        groups: from `prefix_groups`.
        overhead: of a forward pass, in tokens.
        batch_tokens: most positions a batch holds, padding and shared ones of every row included, unless it
            is of one group.
    """
    ordered = sorted(groups, key=lambda group: (group.shared > 0, -group.shared, -group.longest))
    kinds = itertools.groupby(ordered, key=lambda group: group.shared > 0)
    return [batch for _, kind in kinds for batch in _cheapest_cuts(list(kind), overhead, batch_tokens)]


def _cheapest_cuts(
    ordered: Sequence[PrefixGroup], overhead: int, batch_tokens: int
) -> list[list[PrefixGroup]]:
    """Consecutive groups of least cost; a group shares as much as the last of it, which shares least."""
    longest = np.array([group.longest for group in ordered])
    rows = np.array([len(group.rows) for group in ordered])
    passes = 2 if ordered[0].shared else 1
    best = np.zeros(len(ordered) + 1)
    cuts = [0] * (len(ordered) + 1)
    low = 0  # groups that end here begin here at the earliest
    for end, group in enumerate(ordered, 1):
        widest = np.maximum.accumulate(longest[low:end][::-1])[::-1]
        size = np.cumsum(rows[low:end][::-1])[::-1]
        fits = size * widest <= batch_tokens
        fits[-1] = True
        skip = int(fits.argmax())
        low, widest, size = low + skip, widest[skip:], size[skip:]
        once = np.arange(end - low, 0, -1) * group.shared
        computed = once + size * (widest - group.shared) + size * group.shared / COPIES_PER_TOKEN
        cost = best[low:end] + computed + passes * overhead
        cheapest = int(cost.argmin())
        best[end], cuts[end] = cost[cheapest], low + cheapest
    found = []
    end = len(ordered)
    while end:
        found.append(list(ordered[cuts[end] : end]))
        end = cuts[end]
    return found


def assign_ranks(costs: Sequence[int], units: Sequence[int], ranks: int) -> list[int]:
    """The rank of each example: units (examples that share work) go whole, longest first, to the freest rank.

    Args:
        costs: of each example, in tokens.
        units: the number of the unit of each example.
        ranks: how many there are.
    """
    total: Counter[int] = Counter()
    for cost, unit in zip(costs, units, strict=True):
        total[unit] += cost
    load = [0] * ranks
    rank_of: dict[int, int] = {}
    for unit in sorted(total, key=lambda unit: (-total[unit], unit)):
        rank_of[unit] = rank = load.index(min(load))
        load[rank] += total[unit]
    return [rank_of[unit] for unit in units]
