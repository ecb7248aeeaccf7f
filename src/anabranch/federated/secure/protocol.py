"""What both halves of a secure sum have alike.

A round has four messages to each site (Bonawitz et al. 2017, "Practical Secure Aggregation for
Privacy-Preserving Machine Learning", figure 4, against honest but curious parties)::

    keys     two new public keys
    shares   all public keys in; own secrets, cut into shares and sealed for each other site, out
    train    the others' sealed shares and the model in; the masked, weighted update out
    unmask   who sent an update in; shares that remove what does not cancel by itself out

A site's masked update is ``weight * update + stream(own seed) + sum over the others of
+-stream(seed of the pair)``, modulo 2**k. The pairs' masks cancel in the sum. Of a site that sent
its update, the others give shares of its own seed; of one that did not, shares of its private
masking key. Never both of one site.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from anabranch.errors import ConfigurationError
from anabranch.federated.errors import AggregationError, PayloadError
from anabranch.federated.payload import Value
from anabranch.federated.secure.fixed_point import FixedPoint, Vector
from anabranch.federated.secure.masks import agree, stream

KEYS, SHARES, TRAIN, UNMASK = PHASES = ("keys", "shares", "train", "unmask")
FEWEST = 2
"""The sum of one site would be its update."""
EXTRA = 3
"""After the update come its weight, whether there is a loss, and the loss."""


class BelowThreshold(AggregationError):
    """Too few sites are left for their sum to be opened; the model is unchanged."""

    def __init__(self, stage: str, there: Iterable[str], needed: int) -> None:
        names = sorted(there)
        super().__init__(
            f"a secure sum needs {needed} sites; after {stage!r} there are {len(names)}: "
            f"{', '.join(names) or 'none'}"
        )
        self.stage, self.needed = stage, needed


class WrongShares(AggregationError):
    """Shares do not give the secret that they are of: a site lies, or is broken."""


@dataclass(frozen=True)
class SecureOptions:
    """``threshold`` sites at least make a sum: a number, or a share of the sites of the round.

    It is more than half of them, so that no two groups without a common site can be asked for
    different secrets of one site. See :class:`FixedPoint` for the numbers.
    """

    threshold: int | float = 2 / 3
    numbers: FixedPoint = field(default_factory=FixedPoint)

    def __post_init__(self) -> None:
        share = isinstance(self.threshold, float)
        good = 0.5 < self.threshold <= 1 if share else self.threshold >= FEWEST
        if isinstance(self.threshold, bool) or not good:
            raise ConfigurationError(
                f"threshold is a number of sites from {FEWEST} on, or a share above 0.5 up to 1.0, "
                f"not {self.threshold}"
            )

    def needed(self, sites: int) -> int:
        """How many of the sites that sent keys must stay to the end."""
        if isinstance(self.threshold, float):
            return max(FEWEST, math.ceil(self.threshold * sites - 1e-9))
        return max(self.threshold, sites // 2 + 1)

    def require(self, stage: str, there: Iterable[str], sites: int) -> int:
        """The threshold; :class:`BelowThreshold` if fewer are there."""
        there, needed = set(there), self.needed(sites)
        if len(there) < needed:
            raise BelowThreshold(stage, there, needed)
        return needed

    def settings(self) -> dict[str, Any]:
        """As JSON values."""
        return {"threshold": self.threshold, **vars(self.numbers)}


def pair_mask(
    own: str, other: str, private: bytes, public: bytes, size: int, dtype: np.dtype[Any]
) -> Vector:
    """What ``own`` adds for ``other``; the two of a pair add up to 0."""
    mask = stream(agree(private, public, "mask"), size, dtype)
    return mask if own < other else -mask


def letters(payload: Mapping[str, Value], prefix: str) -> dict[str, bytes]:
    """The bytes of a payload under ``prefix/<site>``, by site."""
    found = {}
    for name, value in payload.items():
        head, slash, site = name.partition("/")
        if head == prefix and slash:
            if not isinstance(value, bytes):
                raise PayloadError(f"{name!r} should be bytes, not {type(value).__name__}")
            found[site] = value
    return found
