import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.training.packing import FORWARD_COST, best_fit_decreasing, plan_layouts

ITEMS = st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=2), min_size=1, max_size=30)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(50, 90))
def test_bins_hold_everything_once_and_are_few(lengths, capacity):
    bins = best_fit_decreasing(lengths, capacity)
    assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in members) <= capacity for members in bins)
    # Optimal uses at least this many; the bound is that of Johnson et al.
    fewest = -(-sum(lengths) // capacity)
    at_most_one_a_bin = sum(2 * length > capacity for length in lengths)
    assert len(bins) >= max(fewest, at_most_one_a_bin)
    assert len(bins) <= max(2 * fewest, 1)  # any two bins of a best fit are more than one full


def test_the_fullest_bin_that_still_takes_it():
    assert best_fit_decreasing([6, 5, 3, 4], capacity=10) == [[0, 3], [1, 2]]
    assert best_fit_decreasing([], capacity=10) == []


@given(ITEMS, st.integers(120, 400), st.sampled_from(["none", "bfd"]))
def test_layouts_are_valid(lengths, budget, packing):
    layouts = plan_layouts(lengths, budget, packing)
    placed = [(s.item, s.example) for layout in layouts for s in layout.segments]
    assert sorted(placed) == [(i, e) for i, item in enumerate(lengths) for e in range(len(item))]
    for layout in layouts:
        assert layout.size <= budget
        assert [(s.item, s.example) for s in layout.segments] == sorted(
            (s.item, s.example) for s in layout.segments
        )
        taken = [(s.row, c) for s in layout.segments for c in range(s.start, s.start + s.length)]
        assert len(taken) == len(set(taken)), "two sequences overlap"
        assert all(s.length == lengths[s.item][s.example] for s in layout.segments)
        if packing == "none":
            assert not layout.packed
        # All examples of an item are here, or none.
        assert len(layout.segments) == sum(len(lengths[i]) for i in layout.items)


@given(st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=1), min_size=1, max_size=30))
def test_packing_never_costs_more_than_padding(lengths):
    for start in FORWARD_COST.values():
        costs = [
            sum(layout.cost + start for layout in plan_layouts(lengths, 10**6, packing, start))
            for packing in ("bfd", "none")
        ]
        assert costs[0] <= costs[1]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=7), st.integers(0, 100))
def test_padded_groups_are_the_cheapest_of_all(lengths, start):
    """Every way to cut the sorted sequences, tried out."""

    def cost(group):
        (layout,) = plan_layouts([[length] for length in group], 10**6, "none", 10**9)
        return layout.cost + start

    ordered = sorted(lengths, reverse=True)
    found = plan_layouts([[length] for length in lengths], 10**6, "none", start)
    cheapest = min(
        sum(cost(ordered[a:b]) for a, b in itertools.pairwise([0, *cuts, len(ordered)]))
        for count in range(len(ordered))
        for cuts in itertools.combinations(range(1, len(ordered)), count)
    )
    assert sum(layout.cost + start for layout in found) == pytest.approx(cheapest)


def test_an_accelerator_packs_into_few_passes_and_a_processor_into_short_rows():
    lengths = [[n] for n in (53, 79, 117, 133, 149, 168, 184, 203)]
    (packed,) = plan_layouts(lengths, 4096, "bfd", FORWARD_COST["cuda"])
    assert packed.packed and packed.size < 1.15 * sum(n for (n,) in lengths)
    short = plan_layouts(lengths, 4096, "bfd", FORWARD_COST["cpu"])
    assert len(short) > 1 and not any(layout.packed for layout in short)


def test_an_item_larger_than_the_budget_gets_a_micro_batch_of_its_own():
    layouts = plan_layouts([[50], [5], [5]], 20, "bfd")
    assert sorted(layout.items for layout in layouts) == [[0], [1, 2]]


@pytest.mark.parametrize("packing", ["none", "bfd"])
def test_one_item(packing):
    (layout,) = plan_layouts([[7]], 100, packing)
    assert (layout.rows, layout.columns, layout.packed) == (1, 7, False)
