"""A recommender whose scores are products of user and item vectors."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from anabranch.errors import MissingExtra
from anabranch.evaluation.ranking import Average, Denominator, Ranking, masked, rank, top_k
from anabranch.graphs import saved
from anabranch.graphs.recommend.errors import NotFitted, RecommendError
from anabranch.graphs.recommend.interactions import Interactions
from anabranch.models.progress import Progress, silent

try:
    from sklearn.base import BaseEstimator
except ImportError:
    raise MissingExtra("scikit-learn", "graphs") from None

_FORMAT = 1
Side = Literal["user", "item"]


class FactorRecommender(BaseEstimator, ABC):
    """Fitted: ``user_factors_`` float32 [users, dim], ``item_factors_`` float32 [items, dim].

    The score of an item is the inner product. The factors may be stored as smaller tables:
    ``tables_[side]`` [rows, dim] and ``rows_[side]`` int64 [ids, h], the rows that sum up to each
    id's vector (None: row i is id i). ``seen_`` [users, items] is what was fitted on.

    Parameters follow scikit-learn's rules: the constructor stores, ``fit`` checks,
    ``get_params``, ``set_params`` and ``clone`` work.
    """

    tables_: dict[Side, NDArray[np.float32]]
    rows_: dict[Side, NDArray[np.int64] | None]
    seen_: sparse.csr_array
    ids_: dict[Side, NDArray[Any] | None]

    @abstractmethod
    def fit(
        self,
        train: Any,
        *,
        validation: Interactions | None = None,
        progress: Progress = silent,
    ) -> Self:
        """Learn from ``train``: :class:`Interactions`, or a matrix [users, items]."""

    @property
    def user_factors_(self) -> NDArray[np.float32]:
        """Vectors of the users [users, dim]."""
        return self._factors("user")

    @property
    def item_factors_(self) -> NDArray[np.float32]:
        """Vectors of the items [items, dim]."""
        return self._factors("item")

    def scores(self, users: ArrayLike) -> NDArray[np.float32]:
        """Scores [b, items] of all items for the users [b], row numbers."""
        rows = self._users(users)
        return self._vectors("user", rows) @ self.item_factors_.T

    def recommend(
        self, users: ArrayLike, k: int = 20, *, exclude_seen: bool = True, batch: int = 512
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The best ``k`` items of each user [b, k], best first, and their scores [b, k].

        ``exclude_seen`` leaves out what was fitted on. A user with fewer than k items left has
        -1 with the score -inf at the end. A user nothing was learnt of gets what its untrained
        vector gives; see the warning of ``fit``.
        """
        rows = self._users(users)
        if k < 1 or batch < 1:
            raise RecommendError(f"k = {k}, batch = {batch}: both are at least 1")
        depth = min(k, len(self.item_factors_))
        items = np.full((len(rows), k), -1, np.int64)
        found = np.full((len(rows), k), -np.inf, np.float32)
        for start in range(0, len(rows), batch):
            block = rows[start : start + batch]
            scores = masked(self.scores(block), self.seen_[block] if exclude_seen else None)
            best, values = top_k(scores, depth)
            items[start : start + batch, :depth] = np.where(np.isneginf(values), -1, best)
            found[start : start + batch, :depth] = values
        return items, found

    def evaluate(
        self,
        test: Interactions,
        *,
        k: int = 20,
        denominator: Denominator = "relevant",
        average: Average = "active",
    ) -> Ranking:
        """Full-ranking figures on held-out interactions, with everything fitted on masked."""
        self._check_fitted()
        if (test.num_users, test.num_items) != self.seen_.shape:
            raise RecommendError(
                f"test has {test.num_users} users and {test.num_items} items, fitted were "
                f"{self.seen_.shape[0]} and {self.seen_.shape[1]}"
            )
        switches: dict[str, Any] = {"denominator": denominator, "average": average}
        return rank(self.scores, test.csr(), self.seen_, k=k, **switches)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one ``.npz`` file, whole or not at all. Shared rows are stored once."""
        self._check_fitted()
        arrays: dict[str, Any] = {"indptr": self.seen_.indptr, "indices": self.seen_.indices}
        for side in _SIDES:
            arrays[f"{side}.table"] = self.tables_[side]
            for name, found in (("rows", self.rows_[side]), ("ids", self.ids_[side])):
                if found is not None:
                    arrays[f"{side}.{name}"] = found
        facts = {
            "format": _FORMAT,
            "class": type(self).__name__,
            "parameters": plain_parameters(self),
            "shape": list(self.seen_.shape),
            "fitted": self._facts(),
        }
        saved.save(path, facts, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """The recommender that :meth:`save` of this class wrote."""
        facts, arrays = saved.load(path, "recommender", _FORMAT, RecommendError)
        if facts["class"] != cls.__name__:
            raise RecommendError(f"{path} holds a {facts['class']}: load it with that class")
        found = cls(**cls._from_plain(facts["parameters"]))
        indices, indptr = arrays["indices"], arrays["indptr"]
        data = np.ones(len(indices), np.float32)
        found._keep(
            {side: arrays[f"{side}.table"] for side in _SIDES},
            {side: arrays.get(f"{side}.rows") for side in _SIDES},
            sparse.csr_array((data, indices, indptr), shape=tuple(facts["shape"])),
            {side: arrays.get(f"{side}.ids") for side in _SIDES},
        )
        for name, value in facts["fitted"].items():
            setattr(found, name, value)
        return found

    def _keep(
        self,
        tables: dict[Side, NDArray[np.float32]],
        rows: dict[Side, NDArray[np.int64] | None],
        seen: sparse.csr_array,
        ids: dict[Side, NDArray[Any] | None],
    ) -> None:
        """Become fitted."""
        self.tables_, self.rows_, self.seen_, self.ids_ = tables, rows, seen, ids

    def _facts(self) -> dict[str, Any]:
        """What else of the fitted state to save, as JSON values by attribute."""
        return {}

    @classmethod
    def _from_plain(cls, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Constructor arguments from what :func:`plain_parameters` made of them."""
        return dict(parameters)

    def _factors(self, side: Side) -> NDArray[np.float32]:
        self._check_fitted()
        return self._vectors(side, slice(None))

    def _vectors(self, side: Side, which: Any) -> NDArray[np.float32]:
        table, rows = self.tables_[side], self.rows_[side]
        return table[which] if rows is None else table[rows[which]].sum(axis=1)

    def _users(self, users: ArrayLike) -> NDArray[np.int64]:
        self._check_fitted()
        rows = np.asarray(users)
        count = self.seen_.shape[0]
        if rows.size == 0:
            return np.empty(0, np.int64)
        if rows.ndim != 1 or rows.dtype.kind not in "iu":
            raise RecommendError(f"users are a list of row numbers, not {rows.dtype} {rows.shape}")
        outside = (rows < 0) | (rows >= count)
        if outside.any():
            raise RecommendError(f"no user {rows[outside][0]} in 0..{count - 1}")
        return rows.astype(np.int64)

    def _check_fitted(self) -> None:
        if not hasattr(self, "tables_"):
            raise NotFitted(f"this {type(self).__name__} is not fitted yet: call fit first")


_SIDES: tuple[Side, Side] = ("user", "item")


def plain_parameters(estimator: BaseEstimator) -> dict[str, Any]:
    """Parameters as JSON values; an estimator among them by class and parameters."""
    plain: dict[str, Any] = {}
    for name, value in estimator.get_params(deep=False).items():
        if isinstance(value, BaseEstimator):
            value = {"class": type(value).__name__, "parameters": plain_parameters(value)}
        plain[name] = os.fspath(value) if isinstance(value, os.PathLike) else value
    return plain


def same_ids(train: Interactions) -> dict[Side, NDArray[Any] | None]:
    """The names of users and items, to be saved with the factors."""
    return {"user": train.user_ids, "item": train.item_ids}
