"""Small interactions, drawn by hypothesis or planted."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from anabranch.graphs.recommend import Interactions
from anabranch.graphs.recommend.data import planted_interactions

PLANTED = planted_interactions(60, 50, 4, per_user=12, inside=0.9, seed=3).compact()


@st.composite
def interactions(draw: st.DrawFn, most: int = 9, least: int = 0) -> Interactions:
    """Any pairs, with duplicates, idle users and items, sometimes with times."""
    users, items = draw(st.integers(1, most)), draw(st.integers(1, most))
    pair = st.tuples(st.integers(0, users - 1), st.integers(0, items - 1))
    pairs = np.array(draw(st.lists(pair, min_size=least, max_size=4 * most)), np.int64)
    pairs = pairs.reshape(-1, 2)
    time = None
    if draw(st.booleans()):
        some = st.lists(st.integers(0, 5), min_size=len(pairs), max_size=len(pairs))
        time = np.array(draw(some), float)
    return Interactions(pairs[:, 0], pairs[:, 1], users, items, time=time)
