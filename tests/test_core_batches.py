import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nanochat.evaluation.core import batching
from nanochat.evaluation.core.batching import PrefixGroup, Span

# Few token ids, so that prefixes, repeats and ties are common.
ROWS = st.lists(
    st.tuples(st.lists(st.integers(0, 2), min_size=2, max_size=70), st.integers(0, 10**6)),
    min_size=1,
    max_size=12,
)


def spans_of(rows):
    return [Span(np.array(ids, np.int32), 1 + pick % (len(ids) - 1)) for ids, pick in rows]


@given(ROWS)
def test_every_span_finds_its_inputs_and_none_begins_another(rows):
    spans = spans_of(rows)
    rows = batching.rows_of(spans)
    assert {id(span) for row in rows for span in row.spans} == set(map(id, spans))
    assert sum(len(row.spans) for row in rows) == len(spans)
    for row in rows:
        assert row.first_scored == min(span.start for span in row.spans) - 1
        for span in row.spans:
            np.testing.assert_array_equal(row.ids[: len(span.ids) - 1], span.ids[:-1])
    texts = [tuple(row.ids) for row in rows]
    assert texts == sorted(texts)
    assert not any(a != b and b[: len(a)] == a for a in texts for b in texts)


@given(ROWS, st.integers(0, 40), st.integers(1, 400))
def test_groups_and_batches_hold_everything_once_share_truly_and_keep_the_bound(rows, overhead, bound):
    batching.MIN_SHARED, before = 2, batching.MIN_SHARED
    try:
        inputs = batching.rows_of(spans_of(rows))
        found = batching.prefix_groups(inputs, overhead, bound)
        plan = batching.batches(found, overhead, bound)
    finally:
        batching.MIN_SHARED = before
    seen = sorted(id(row) for batch in plan for group in batch for row in group.rows)
    assert seen == sorted(map(id, inputs))
    for batch in plan:
        shared = min(group.shared for group in batch)
        longest = max(group.longest for group in batch)
        for group in batch:
            assert bool(group.shared) == bool(shared)
            assert group.longest == max(len(row.ids) for row in group.rows)
            first = group.rows[0].ids
            for row in group.rows:
                np.testing.assert_array_equal(row.ids[: group.shared], first[: group.shared])
                # What is scored lies in the part that each row reads for itself.
                assert not group.shared or group.shared <= row.first_scored
                assert len(row.ids) > shared
        if len(batch) > 1:
            assert sum(len(group.rows) for group in batch) * longest <= bound


def test_options_that_differ_in_their_last_token_are_one_input():
    prompt = list(range(100))
    spans = [Span(np.array([*prompt, option], np.int32), 100) for option in (7, 8, 9)]
    [row] = batching.rows_of(spans)
    assert row.spans == spans


def test_a_long_common_beginning_is_shared_and_a_short_one_is_not():
    story = list(range(200))
    spans = [Span(np.array([*story, 500 + n, 600, 700], np.int32), 201) for n in range(4)]
    spans += [Span(np.array([900, 901, 902 + n, 903], np.int32), 3) for n in range(2)]
    found = batching.prefix_groups(batching.rows_of(spans), 10, 10_000)
    assert sorted((group.shared, len(group.rows)) for group in found) == [(0, 1), (0, 1), (200, 4)]


def test_the_cut_into_batches_is_the_cheapest_of_all():
    lengths = [90, 80, 79, 40, 39, 38, 12]
    rows = [PrefixGroup(0, (n,), length) for n, length in enumerate(lengths)]

    def cost(groups):
        return sum(len(group) * max(group) + 30 for group in groups)

    def ways(items):
        if not items:
            yield []
        for size in range(1, len(items) + 1):
            if size * items[0] <= 250:
                for rest in ways(items[size:]):
                    yield [items[:size], *rest]

    plan = batching.batches(rows, 30, 250)
    found = cost([[group.longest for group in batch] for batch in plan])
    assert found == min(cost(groups) for groups in ways(lengths))


def test_work_is_dealt_evenly_and_units_stay_whole():
    rng = np.random.default_rng(0)
    costs = rng.integers(10, 1000, 500).tolist()
    units = rng.integers(0, 120, 500).tolist()
    homes = batching.assign_ranks(costs, units, 3)
    assert len(set(zip(units, homes, strict=True))) == len(set(units))
    loads = [sum(cost for cost, home in zip(costs, homes, strict=True) if home == rank) for rank in range(3)]
    assert max(loads) - min(loads) < 0.02 * sum(loads)
    assert batching.assign_ranks(costs, units, 1) == [0] * 500
