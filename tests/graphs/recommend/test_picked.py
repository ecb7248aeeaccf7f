"""Picked scores and their gradients against the whole product."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.graphs.recommend import Interactions, UltraGCN
from anabranch.graphs.recommend.picked import picked_scores


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 6), st.integers(1, 9), st.integers(1, 12), st.integers(1, 5), st.integers(0, 99)
)
def test_scores_and_gradients_are_those_of_the_whole_product(
    rows: int, items: int, columns: int, dim: int, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    vectors, table = (
        torch.randn(n, dim, dtype=torch.float64, generator=draw, requires_grad=True)
        for n in (rows, items)
    )
    at = torch.randint(items, (rows, columns), generator=draw)  # columns come again and again
    weights = torch.randn(rows, columns, dtype=torch.float64, generator=draw)
    found = picked_scores(vectors, table, at)
    wanted = (vectors @ table.T).gather(1, at)
    assert torch.allclose(found, wanted)
    for mine, whole in zip(
        torch.autograd.grad((found * weights).sum(), (vectors, table)),
        torch.autograd.grad((wanted * weights).sum(), (vectors, table)),
        strict=True,
    ):
        assert torch.allclose(mine, whole)


def test_columns_of_no_item_are_refused() -> None:
    with pytest.raises(IndexError):
        picked_scores(torch.zeros(1, 2), torch.zeros(3, 2), torch.tensor([[3]]))


def test_all_items_are_scored_only_where_that_is_faster() -> None:
    model = UltraGCN(negatives=100, neighbours=10)
    of = [Interactions([0], [0], 1, items) for items in (3_330, 3_331)]
    assert [model._in_blocks(train) for train in of] == [True, False]
