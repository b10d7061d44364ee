"""Which tokens CORE computes, and together with which others. Pure arithmetic on token ids.

Rows that begin alike are a group: their common beginning is computed once, and each goes on from there.
Options of one example are such rows, and so are the questions about one story. Groups of about the same
size make a batch. Both choices minimize the tokens computed, padding included, where a forward pass counts
as `overhead` tokens more and a shared token that is copied for a row as 1 / `COPIES_PER_TOKEN`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]

# Copying the keys and values of a position of all layers, against computing them (depth 4, CPU).
COPIES_PER_TOKEN = 16
MIN_SHARED = 24  # tokens; less is not worth a second forward pass
MAX_GROUP_ROWS = 64  # rows


@dataclass(frozen=True)
class Span:
    """Tokens of one row whose loss is asked.

    Attributes:
        ids: the row, (T,) int32.
        start: first scored token, at least 1.
        end: one after the last.
    """

    ids: Ids
    start: int
    end: int


@dataclass(frozen=True)
class PrefixGroup:
    """Inputs that begin with the same tokens.

    Attributes:
        shared: how many tokens they share and compute once; 0 for one input.
        inputs: indices into Inputs.ids.
        longest: tokens of the longest of them.
    """

    shared: int
    inputs: tuple[int, ...]
    longest: int


@dataclass(frozen=True)
class Inputs:
    """What must be read to score some spans.

    Attributes:
        ids: distinct token sequences in lexicographic order, none the beginning of another.
        of_span: for each span, the index of the sequence that contains its inputs.
        first_scored: for each sequence, the first position whose output is wanted.
    """

    ids: tuple[Ids, ...]
    of_span: tuple[int, ...]
    first_scored: tuple[int, ...]

    @staticmethod
    def of(spans: Sequence[Span]) -> Inputs:
        """Find them. The last token of a row is only ever a target, so it is no input."""
        # Big-endian bytes sort like the numbers.
        keys = [span.ids[: span.end - 1].astype(">i4").tobytes() for span in spans]
        order = sorted(range(len(spans)), key=lambda place: keys[place])
        of_span = [0] * len(spans)
        kept: list[int] = []  # spans whose inputs are kept, last sequence first
        first: list[int] = []
        for place in reversed(order):
            # What begins another sequence sorts directly before those that it begins.
            if not kept or not keys[kept[-1]].startswith(keys[place]):
                kept.append(place)
                first.append(spans[place].start - 1)
            of_span[place] = len(kept) - 1
            first[-1] = min(first[-1], spans[place].start - 1)
        last = len(kept) - 1
        ids = tuple(spans[place].ids[: spans[place].end - 1] for place in reversed(kept))
        return Inputs(ids, tuple(last - number for number in of_span), tuple(reversed(first)))


def prefix_groups(inputs: Inputs, overhead: int, batch_tokens: int) -> list[PrefixGroup]:
    """Cut the sorted inputs into groups at the least cost."""
    lengths = [len(ids) for ids in inputs.ids]
    common = [0] + [_common(a, b) for a, b in zip(inputs.ids, inputs.ids[1:], strict=False)]
    # best[j]: least cost of the first j inputs; cut[j]: where the last group of that solution begins.
    best, cut, depth = [0.0], [0], [0]
    for j in range(1, len(lengths) + 1):
        i = j - 1
        cost, begin, shared = best[i] + lengths[i] + overhead, i, 0
        longest, limit = lengths[i], inputs.first_scored[i]
        while i > 0 and j - i < MAX_GROUP_ROWS:
            limit = min(limit, common[i], inputs.first_scored[i - 1])
            i -= 1
            longest, size = max(longest, lengths[i]), j - i
            if limit < MIN_SHARED or size * longest > batch_tokens:
                break
            computed = limit + size * (longest - limit) + size * limit / COPIES_PER_TOKEN
            if best[i] + computed + 2 * overhead < cost:
                cost, begin, shared = best[i] + computed + 2 * overhead, i, limit
        best.append(cost)
        cut.append(begin)
        depth.append(shared)
    found = []
    end = len(lengths)
    while end:
        begin = cut[end]
        found.append(PrefixGroup(depth[end], tuple(range(begin, end)), max(lengths[begin:end])))
        end = begin
    return found


def _common(a: Ids, b: Ids) -> int:
    shortest = min(len(a), len(b))
    differs = a[:shortest] != b[:shortest]
    return int(differs.argmax()) if differs.any() else shortest


def batches(found: Sequence[PrefixGroup], overhead: int, batch_tokens: int) -> list[list[PrefixGroup]]:
    """Put groups that share something, and single rows, into batches at the least cost.

    Args:
        found: from `prefix_groups`.
        overhead: of a forward pass, in tokens.
        batch_tokens: most positions a batch holds, padding and shared ones of every row included, unless it
            is of one group.
    """
    alone = sorted((group for group in found if not group.shared), key=lambda group: -group.longest)
    sharing = sorted(
        (group for group in found if group.shared), key=lambda group: (-group.shared, -group.longest)
    )
    return [
        group for part in (alone, sharing) if part for group in _cheapest_cuts(part, overhead, batch_tokens)
    ]


def _cheapest_cuts(
    ordered: Sequence[PrefixGroup], overhead: int, batch_tokens: int
) -> list[list[PrefixGroup]]:
    """Consecutive groups of least cost; a group shares as much as the last of it, which shares least."""
    count = len(ordered)
    longest = np.array([group.longest for group in ordered])
    rows = np.array([len(group.inputs) for group in ordered])
    passes = 2 if ordered[0].shared else 1
    best = np.zeros(count + 1)
    cut = np.zeros(count + 1, dtype=np.int64)
    low = 0  # groups that end here begin here at the earliest
    for j in range(1, count + 1):
        shared = ordered[j - 1].shared
        widest = np.maximum.accumulate(longest[low:j][::-1])[::-1]
        size = np.cumsum(rows[low:j][::-1])[::-1]
        fits = size * widest <= batch_tokens
        fits[-1] = True
        if not fits[0]:
            skip = int(fits.argmax())
            low, widest, size = low + skip, widest[skip:], size[skip:]
        once = np.arange(j - low, 0, -1) * shared
        computed = once + size * (widest - shared) + size * shared / COPIES_PER_TOKEN
        cost = best[low:j] + computed + passes * overhead
        place = int(cost.argmin())
        best[j], cut[j] = cost[place], low + place
    groups = []
    end = count
    while end:
        begin = int(cut[end])
        groups.append(list(ordered[begin:end]))
        end = begin
    return groups


def share_out(costs: Sequence[int], units: Sequence[int], ranks: int) -> list[int]:
    """The rank of each example: units (examples that share work) go whole, longest first, to the freest rank.

    Args:
        costs: of each example, in tokens.
        units: the number of the unit of each example.
        ranks: how many there are.
    """
    total: dict[int, int] = {}
    for cost, unit in zip(costs, units, strict=True):
        total[unit] = total.get(unit, 0) + cost
    load = [0] * ranks
    home: dict[int, int] = {}
    for unit in sorted(total, key=lambda unit: (-total[unit], unit)):
        rank = min(range(ranks), key=lambda rank: load[rank])
        load[rank] += total[unit]
        home[unit] = rank
    return [home[unit] for unit in units]
