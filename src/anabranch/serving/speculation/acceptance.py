"""How often drafts are accepted, and what that makes of a length."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from anabranch.errors import ConfigurationError

GROUP_TRIALS = 8.0
"""Judged tokens that a request's group counts for in its own estimate. With fewer, the request that
was lucky so far is taken for the best one, and too much is drafted for it."""


class RequestClass(NamedTuple):
    """Drafts of one group in one request: alike the group's until they show otherwise."""

    group: Hashable
    request: Hashable


def expected_tokens(alpha: ArrayLike, k: ArrayLike) -> np.ndarray:
    """Tokens that a sequence gets from k drafted ones: those accepted, and the one after them.

    1 + alpha + ... + alpha^k, for a chance ``alpha`` in [0, 1] that a token is accepted once all
    before it were. Arrays broadcast.
    """
    alpha, k = np.broadcast_arrays(np.asarray(alpha, float), np.asarray(k, float))
    refused = 1.0 - alpha
    # Close to 1 the quotient is 0 / 0, and all k + 1 terms are 1 to within k^2 times as much.
    certain = refused < 1e-9
    return np.where(certain, k + 1.0, (1.0 - alpha ** (k + 1)) / np.where(certain, 1.0, refused))


class AcceptanceEstimator:
    """Chance that a drafted token is accepted, for each class of drafts.

    Counts accepted and judged tokens. A token is judged only if all before it were accepted: those
    after a refusal say nothing. ``prior`` is (accepted, judged) that a class starts with;
    ``forgetting`` is what each step in which it was judged leaves of older counts.
    """

    def __init__(self, forgetting: float = 0.99, prior: tuple[float, float] = (14.0, 20.0)) -> None:
        accepted, judged = prior
        if not 0 <= accepted <= judged or not judged > 0:
            raise ConfigurationError(
                f"prior must be accepted and judged tokens, with 0 <= accepted <= judged and "
                f"judged > 0, not {prior}"
            )
        if not 0 < forgetting <= 1:
            raise ConfigurationError(f"forgetting must be above 0 and at most 1, not {forgetting}")
        self._forgetting = forgetting
        self._prior = accepted, judged
        self._counts: dict[Hashable, tuple[float, float]] = {}
        self._own: dict[Hashable, dict[Hashable, tuple[float, float]]] = {}
        """Of requests, by group."""
        self._judged_now: set[Hashable] = set()

    def alpha(self, of: Hashable) -> float:
        """The estimate for a class."""
        if isinstance(of, RequestClass):
            accepted, judged = self._own.get(of.request, {}).get(of.group, (0.0, 0.0))
            return (accepted + GROUP_TRIALS * self.alpha(of.group)) / (judged + GROUP_TRIALS)
        accepted, judged = self._counts.get(of, self._prior)
        return accepted / judged

    def alphas(self, classes: Sequence[Hashable]) -> np.ndarray:
        """The estimate for each of many sequences, ``[sequences]``."""
        known = {of: self.alpha(of) for of in dict.fromkeys(classes)}
        return np.array([known[of] for of in classes])

    def next_step(self) -> None:
        """What is observed from now on is a step later than what was before."""
        self._judged_now.clear()

    def observe(self, of: Hashable, accepted: int, rejected: bool) -> None:
        """Of one sequence: drafted tokens that were accepted, and whether one was refused."""
        judged = accepted + rejected
        if not judged:
            return
        if isinstance(of, RequestClass):
            own = self._own.setdefault(of.request, {})
            own[of.group] = self._added(of, own.get(of.group, (0.0, 0.0)), accepted, judged)
            of = of.group
        self._counts[of] = self._added(of, self._counts.get(of, self._prior), accepted, judged)

    def release(self, request: Hashable) -> None:
        """Forget a request's own counts; its groups keep what it taught."""
        self._own.pop(request, None)

    def _added(
        self, of: Hashable, before: tuple[float, float], accepted: int, judged: int
    ) -> tuple[float, float]:
        kept = 1.0 if of in self._judged_now else self._forgetting
        self._judged_now.add(of)
        return kept * before[0] + accepted, kept * before[1] + judged
