"""Who interacted with what: the data of every recommender, checked once, immutable."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from anabranch.graphs.errors import GraphError
from anabranch.graphs.graph import Graph
from anabranch.graphs.recommend.errors import RecommendError

Part = Literal["all", "train", "validation", "test"]
How = Literal["random", "per_user", "time"]


@dataclass(frozen=True, eq=False)
class Interactions:
    """Distinct (user, item) pairs, ordered by user and then item.

    ``user`` and ``item`` int32 [m] are row numbers below ``num_users`` and ``num_items``. A pair
    that is given more than once counts once, with the latest ``time`` (without times: the last
    one given); ``merged`` says how many were. ``time`` float64 [m] and ``rating`` float32 [m] or
    None. ``user_ids`` and ``item_ids`` are names outside, None if they are the row numbers.
    ``part`` says which part of a split this is: what must not learn from held-out interactions
    refuses them.

    Users and items without interactions are legal, and so is having none at all.
    """

    user: NDArray[np.int32]
    item: NDArray[np.int32]
    num_users: int
    num_items: int
    time: NDArray[np.float64] | None = None
    rating: NDArray[np.float32] | None = None
    user_ids: NDArray[Any] | None = None
    item_ids: NDArray[Any] | None = None
    part: Part = "all"
    merged: int = 0

    def __post_init__(self) -> None:
        user = _row_numbers(self.user, "user", self.num_users)
        item = _row_numbers(self.item, "item", self.num_items)
        if len(user) != len(item):
            raise RecommendError(f"{len(user)} users for {len(item)} items: give one each")
        time = _column(self.time, "time", len(user), np.float64)
        rating = _column(self.rating, "rating", len(user), np.float32)
        last = _last_of_each_pair(user, item, time)
        for name, values in (("user", user), ("item", item), ("time", time), ("rating", rating)):
            object.__setattr__(self, name, None if values is None else _frozen(values[last]))
        object.__setattr__(self, "merged", self.merged + len(user) - len(last))
        for name, count in (("user_ids", self.num_users), ("item_ids", self.num_items)):
            ids = getattr(self, name)
            if ids is not None and len(ids) != count:
                raise RecommendError(f"{len(ids)} {name} for {count} rows")

    @classmethod
    def from_pairs(
        cls,
        user: ArrayLike,
        item: ArrayLike,
        *,
        time: ArrayLike | None = None,
        rating: ArrayLike | None = None,
        num_users: int | None = None,
        num_items: int | None = None,
        relabel: bool = False,
    ) -> Self:
        """From two arrays [m]. Text is always a name; whole numbers are names with ``relabel``.

        Names become rows in sorted order; otherwise the counts default to the largest number + 1.
        """
        sides: dict[str, Any] = {}
        for name, values, count in (("user", user, num_users), ("item", item, num_items)):
            given = np.asarray(values)
            if relabel or given.dtype.kind in "USO":
                if count is not None:
                    raise RecommendError(f"num_{name}s is found from the names: do not pass it")
                ids, given = np.unique(
                    given.astype(str) if given.dtype.kind in "SO" else given, return_inverse=True
                )
                sides[f"{name}_ids"], count = ids, len(ids)
            sides[name] = given
            largest = _row_numbers(given, name, None).max(initial=-1)
            sides[f"num_{name}s"] = int(largest) + 1 if count is None else count
        return cls(**sides, time=time, rating=rating)  # type: ignore[arg-type]

    @classmethod
    def from_matrix(cls, matrix: Any) -> Self:
        """From a dense or SciPy sparse matrix [users, items]; every entry above 0 counts.

        Values are kept as ratings if they are not all 1.
        """
        try:
            checked = Graph.bipartite(matrix).biadjacency().tocoo()
        except GraphError as error:
            raise RecommendError(str(error)) from None
        users, items = np.shape(matrix)
        rating = None if np.all(checked.data == 1) else checked.data
        return cls(checked.row, checked.col, users, items, rating=rating)

    def __len__(self) -> int:
        return len(self.user)

    @property
    def user_degree(self) -> NDArray[np.int64]:
        """Items of each user [num_users]."""
        return np.bincount(self.user, minlength=self.num_users)

    def popularity(self) -> NDArray[np.int64]:
        """Users of each item [num_items]."""
        return np.bincount(self.item, minlength=self.num_items)

    def csr(self) -> sparse.csr_array:
        """The binary matrix [num_users, num_items] in float32."""
        indptr = np.concatenate([[0], np.cumsum(self.user_degree)])
        data = np.ones(len(self), np.float32)
        matrix = sparse.csr_array(
            (data, self.item, indptr), shape=(self.num_users, self.num_items), copy=True
        )
        matrix.has_canonical_format = True
        return matrix

    def by_user(self) -> list[NDArray[np.int32]]:
        """The items of each user, increasing."""
        return np.split(self.item, np.cumsum(self.user_degree)[:-1]) if self.num_users else []

    def keys(self) -> NDArray[np.int64]:
        """user * num_items + item, increasing: one number a pair."""
        return self.user.astype(np.int64) * self.num_items + self.item

    def select(self, which: NDArray[Any], part: Part | None = None) -> Self:
        """Some of the interactions (a mask or positions) among the same users and items."""
        time = None if self.time is None else self.time[which]
        rating = None if self.rating is None else self.rating[which]
        return replace(
            self,
            user=self.user[which],
            item=self.item[which],
            time=time,
            rating=rating,
            part=part or self.part,
            merged=0,
        )

    def rated_at_least(self, rating: float) -> Self:
        """The interactions with this rating or a better one."""
        if self.rating is None:
            raise RecommendError("these interactions have no ratings to choose by")
        return self.select(self.rating >= rating)

    def compact(self) -> Self:
        """Without users and items that have no interaction; their names or numbers become ids."""
        fields: dict[str, Any] = {}
        for name, count in (("user", self.num_users), ("item", self.num_items)):
            used, rows = np.unique(getattr(self, name), return_inverse=True)
            ids = getattr(self, f"{name}_ids")
            fields |= {
                name: rows.astype(np.int32),
                f"num_{name}s": len(used),
                f"{name}_ids": (np.arange(count) if ids is None else ids)[used],
            }
        return replace(self, **fields)

    def joined(self, other: Interactions) -> Self:
        """These and the other's pairs, without times and ratings."""
        if (self.num_users, self.num_items) != (other.num_users, other.num_items):
            raise RecommendError(_other_shape(self, other))
        return replace(
            self,
            user=np.concatenate([self.user, other.user]),
            item=np.concatenate([self.item, other.item]),
            time=None,
            rating=None,
        )

    def split(
        self,
        how: How = "random",
        test: float = 0.2,
        seed: int = 0,
        held_out: Literal["test", "validation"] = "test",
    ) -> tuple[Self, Self]:
        """What to train on, and the share ``test`` of interactions that is held out.

        ``random``: any; ``per_user``: of each user that share rounded down, at random; ``time``:
        the latest of all.
        """
        if not 0 < test < 1:
            raise RecommendError(f"test = {test}: the held-out share lies between 0 and 1")
        generator = np.random.default_rng(seed)
        count = round(test * len(self))
        if how == "random":
            out = generator.permutation(len(self))[:count]
        elif how == "per_user":
            # Within a user the drawn numbers put the interactions in a random order.
            order = np.lexsort((generator.random(len(self)), self.user))
            degree = self.user_degree
            place = np.arange(len(self)) - np.repeat(np.cumsum(degree) - degree, degree)
            out = order[place < np.repeat(np.floor(test * degree), degree)]
        elif how == "time":
            if self.time is None:
                raise RecommendError("a split by time needs times; these interactions have none")
            out = np.argsort(self.time, kind="stable")[len(self) - count :]
        else:
            raise RecommendError(f"split {how!r}: choose 'random', 'per_user' or 'time'")
        mask = np.zeros(len(self), bool)
        mask[out] = True
        return self.select(~mask, "train"), self.select(mask, held_out)

    def fingerprint(self) -> str:
        """A digest of the pairs: equal ones have equal digests, on any machine."""
        digest = hashlib.blake2b(f"{self.num_users} {self.num_items}".encode(), digest_size=16)
        digest.update(self.keys().astype("<i8").tobytes())
        return digest.hexdigest()


def as_interactions(source: Any) -> Interactions:
    """Interactions as they are, or made of a matrix [users, items]."""
    return source if isinstance(source, Interactions) else Interactions.from_matrix(source)


def require_disjoint(train: Interactions, held_out: Interactions) -> None:
    """Refuse held-out interactions of another shape, or that are trained on."""
    if (train.num_users, train.num_items) != (held_out.num_users, held_out.num_items):
        raise RecommendError(_other_shape(train, held_out))
    shared = np.intersect1d(train.keys(), held_out.keys(), assume_unique=True)
    if len(shared):
        user, item = divmod(int(shared[0]), train.num_items)
        raise RecommendError(
            f"{len(shared)} held-out interactions are trained on, the first is user {user} with "
            f"item {item}: split before fitting"
        )


def _other_shape(one: Interactions, other: Interactions) -> str:
    return (
        f"interactions of {other.num_users} users and {other.num_items} items do not belong to "
        f"those of {one.num_users} users and {one.num_items} items"
    )


def _last_of_each_pair(
    user: NDArray[np.int32], item: NDArray[np.int32], time: NDArray[np.float64] | None
) -> NDArray[np.int64]:
    """Positions of the pairs that stay, ordered by user and item."""
    keys = (np.zeros(len(user)) if time is None else time, item, user)
    order = np.lexsort(keys)  # stable: without times the one given last is last
    ends = np.ones(len(order), bool)
    ends[:-1] = (np.diff(user[order]) != 0) | (np.diff(item[order]) != 0)
    return order[ends]


def _row_numbers(values: Any, name: str, count: int | None) -> NDArray[np.int32]:
    numbers = np.asarray(values)
    if numbers.size == 0:
        numbers = numbers.reshape(-1).astype(np.int64)
    if numbers.ndim != 1 or numbers.dtype.kind not in "iuf":
        raise RecommendError(
            f"{name}s are a list of row numbers, not {numbers.dtype} {list(numbers.shape)}; "
            f"Interactions.from_pairs takes names"
        )
    bad = ~np.isfinite(numbers) | (numbers != np.floor(numbers)) | (numbers < 0)
    bad |= numbers > np.iinfo(np.int32).max if count is None else numbers >= count
    if bad.any():
        at = int(np.argmax(bad))
        where = "is no row number" if count is None else f"is outside 0..{count - 1}"
        raise RecommendError(f"interaction {at}: {name} {numbers[at]} {where}")
    return numbers.astype(np.int32)


def _column(values: Any, name: str, count: int, dtype: type[Any]) -> Any:
    if values is None:
        return None
    try:
        column = np.asarray(values, dtype)
    except (TypeError, ValueError) as error:
        raise RecommendError(f"a {name} is no number: {error}") from None
    if column.shape != (count,):
        raise RecommendError(f"{name} of shape {list(column.shape)} for {count} interactions")
    if not np.isfinite(column).all():
        at = int(np.argmin(np.isfinite(column)))
        raise RecommendError(f"interaction {at}: the {name} is {column[at]}")
    return column


def _frozen(values: NDArray[Any]) -> NDArray[Any]:
    values.flags.writeable = False
    return values
