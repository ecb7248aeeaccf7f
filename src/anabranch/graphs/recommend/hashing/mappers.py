"""How ids are mapped to rows: the protocol, and the mappings that need no graph."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator

from anabranch.graphs.recommend.errors import NotFitted, RecommendError
from anabranch.graphs.recommend.hashing.rows import RowAssignment, modulo_rows, universal_hash
from anabranch.graphs.recommend.interactions import Interactions, as_interactions


class IdMapper(BaseEstimator, ABC):
    """Maps users and items to rows, from training interactions only.

    Fitted: ``users_`` and ``items_``, a :class:`RowAssignment` each.
    """

    users_: RowAssignment
    items_: RowAssignment

    def fit(self, interactions: Any, y: object = None) -> Self:
        """Assign rows. Held-out interactions are refused: the assignment would know them."""
        interactions = as_interactions(interactions)
        if interactions.part in ("validation", "test"):
            raise RecommendError(
                f"these are the {interactions.part} interactions of a split: rows may only be "
                f"assigned by those that are trained on"
            )
        if not len(interactions):
            raise RecommendError("no interactions: there is nothing to assign rows by")
        self._check()
        self.users_, self.items_ = self._assign(interactions)
        return self

    @property
    def num_rows_(self) -> tuple[int, int]:
        """Rows of the users' and of the items' table."""
        self._check_fitted()
        return self.users_.num_rows, self.items_.num_rows

    @property
    def reduction_(self) -> float:
        """The share of rows that is saved against one row for each id."""
        rows = sum(self.num_rows_)
        return 1 - rows / (len(self.users_.rows) + len(self.items_.rows))

    def _check(self) -> None:
        """Refuse parameters that cannot work."""

    @abstractmethod
    def _assign(self, interactions: Interactions) -> tuple[RowAssignment, RowAssignment]:
        """The rows of users and of items."""

    def _check_fitted(self) -> None:
        if not hasattr(self, "users_"):
            raise NotFitted(f"this {type(self).__name__} is not fitted yet: call fit first")


class FullTable(IdMapper):
    """A row for each id: what the others are compared with."""

    def _assign(self, interactions: Interactions) -> tuple[RowAssignment, RowAssignment]:
        return (
            RowAssignment.single(np.arange(interactions.num_users), interactions.num_users),
            RowAssignment.single(np.arange(interactions.num_items), interactions.num_items),
        )


@dataclass(eq=False, repr=False)
class SizedMapper(IdMapper):
    """``rows`` of the two tables, or the share ``budget`` of one row for each id."""

    budget: float | None = None
    rows: tuple[int, int] | None = None
    seed: int = 0

    def _check(self) -> None:
        if (self.budget is None) == (self.rows is None):
            raise RecommendError(f"{type(self).__name__} needs either budget or rows")
        if self.budget is not None:
            check_budget(self.budget)
        if self.rows is not None and min(self.rows) < 1:
            raise RecommendError(f"rows = {self.rows}: each table needs at least one row")

    def _sizes(self, interactions: Interactions) -> tuple[int, int]:
        """Rows of the two tables, never more than ids."""
        counts = interactions.num_users, interactions.num_items
        wanted = self.rows or [max(1, round((self.budget or 0) * n)) for n in counts]
        return min(wanted[0], counts[0]), min(wanted[1], counts[1])


class SideMapper(SizedMapper):
    """Maps users and items in the same way, each by their degrees alone."""

    def _assign(self, interactions: Interactions) -> tuple[RowAssignment, RowAssignment]:
        generator = np.random.default_rng(self.seed)
        degrees = interactions.user_degree, interactions.popularity()
        users, items = (
            self._side(degree, size, generator)
            for degree, size in zip(degrees, self._sizes(interactions), strict=True)
        )
        return users, items

    @abstractmethod
    def _side(
        self, degree: NDArray[np.int64], num_rows: int, generator: np.random.Generator
    ) -> RowAssignment:
        """The rows of ids that have these degrees."""


class Modulo(SideMapper):
    """id mod rows."""

    def _side(
        self, degree: NDArray[np.int64], num_rows: int, generator: np.random.Generator
    ) -> RowAssignment:
        return RowAssignment.single(modulo_rows(len(degree), num_rows), num_rows)


class DoubleHash(SideMapper):
    """The sum of two universal hashes into one table: two ids rarely share both."""

    def _side(
        self, degree: NDArray[np.int64], num_rows: int, generator: np.random.Generator
    ) -> RowAssignment:
        return RowAssignment(_two_hashes(len(degree), num_rows, generator), num_rows)


class Frequency(SideMapper):
    """Half of the rows belong to the most frequent ids; the others share the rest by modulo."""

    def _side(
        self, degree: NDArray[np.int64], num_rows: int, generator: np.random.Generator
    ) -> RowAssignment:
        own, others, reserved = _reserved(degree, num_rows)
        rows = np.empty(len(degree), np.int64)
        rows[own] = np.arange(reserved)
        rows[others] = reserved + others % max(1, num_rows - reserved)
        return RowAssignment.single(rows, num_rows)


class DoubleFrequency(SideMapper):
    """As :class:`Frequency`, with two universal hashes for the others.

    An id with a row of its own names it twice: its vector is twice that row.
    """

    def _side(
        self, degree: NDArray[np.int64], num_rows: int, generator: np.random.Generator
    ) -> RowAssignment:
        own, others, reserved = _reserved(degree, num_rows)
        rows = np.empty((len(degree), 2), np.int64)
        shared = _two_hashes(len(degree), max(1, num_rows - reserved), generator)
        rows[others] = reserved + shared[others]
        rows[own] = np.arange(reserved)[:, None]
        return RowAssignment(rows, num_rows)


def check_budget(budget: float) -> None:
    """Refuse a share of rows outside (0, 1]."""
    if not 0 < budget <= 1:
        raise RecommendError(f"budget = {budget}: the share of rows to keep lies in (0, 1]")


def _two_hashes(count: int, num_rows: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """[count, 2]"""
    return np.stack([universal_hash(count, num_rows, generator) for _ in range(2)], axis=1)


def _reserved(
    degree: NDArray[np.int64], num_rows: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Ids with a row of their own (by falling degree, then id), the others, how many the former."""
    by_degree = np.argsort(-degree, kind="stable")
    count = len(degree) if num_rows >= len(degree) else num_rows // 2
    return by_degree[:count], np.sort(by_degree[count:]), count
