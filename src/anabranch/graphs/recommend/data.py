"""The built-in interactions: MovieLens from the package that ships it, Amazon, and planted ones."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import numpy as np

from anabranch.graphs.recommend.errors import RecommendError
from anabranch.graphs.recommend.interactions import Interactions
from anabranch.graphs.recommend.read import read_interactions


def movielens_100k() -> Interactions:
    """MovieLens-100k with all ratings and times, from the installed package ``recbole``.

    Only its data file is read: ``pip install --no-deps recbole`` is enough.
    """
    found = importlib.util.find_spec("recbole")
    if found is None or found.origin is None:
        raise RecommendError(
            "MovieLens-100k is read from the package recbole, which is not installed; "
            "pip install --no-deps recbole is enough"
        )
    path = Path(found.origin).parent / "dataset_example" / "ml-100k" / "ml-100k.inter"
    return read_interactions(path)


def amazon_electronics() -> tuple[Interactions, Interactions]:
    """Training and test part of amazon-electronics-x0: 1,435 users, 1,522 items."""
    root = os.environ.get("ANABRANCH_DATA")
    if not root:
        raise RecommendError(
            "amazon-electronics-x0 is read from the folder that ANABRANCH_DATA names: unset"
        )
    folder = Path(root).expanduser() / "amazon-electronics-x0"
    train, test = (read_interactions(folder / f"{part}.txt.xz") for part in ("train", "test"))
    users = max(train.num_users, test.num_users)
    items = max(train.num_items, test.num_items)
    return (
        Interactions(train.user, train.item, users, items, part="train"),
        Interactions(test.user, test.item, users, items, part="test"),
    )


def planted_interactions(
    users: int,
    items: int,
    communities: int,
    *,
    per_user: int = 25,
    inside: float = 0.8,
    spread: float = 0.5,
    seed: int = 0,
) -> Interactions:
    """Random interactions of users and items with one community each.

    A user draws ``per_user`` items, each from its own community with probability ``inside`` and
    from all otherwise, in proportion to a popularity that is log-normal with ``spread``. Repeated
    draws are merged.
    """
    generator = np.random.default_rng(seed)
    popularity = generator.lognormal(0.0, spread, items)
    of_user = generator.integers(communities, size=users)
    # Every community has an item: the rest are placed at random.
    of_item = np.concatenate(
        [np.arange(communities), generator.integers(communities, size=items - communities)]
    )
    generator.shuffle(of_item)
    drawn = generator.choice(items, (users, per_user), p=popularity / popularity.sum())
    own = generator.random((users, per_user)) < inside
    for community in range(communities):
        members = np.flatnonzero(of_item == community)
        weights = popularity[members] / popularity[members].sum()
        mine = own & (of_user == community)[:, None]
        drawn[mine] = generator.choice(members, int(mine.sum()), p=weights)
    return Interactions(
        np.repeat(np.arange(users), per_user).astype(np.int32),
        drawn.ravel().astype(np.int32),
        users,
        items,
    )
