"""Successive halving: many trials for a few rounds, the best of them for more.

Jamieson and Talwalkar 2016 ("Non-stochastic Best Arm Identification and Hyperparameter
Optimization", section 3), with the budgets of Hyperband's brackets (Li et al. 2018, section 3): at
each rung about as many rounds are spent in all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from anabranch.errors import ConfigurationError


@dataclass(frozen=True)
class Rung:
    """So many ``trials`` go on to so many ``rounds``, those before included."""

    trials: int
    rounds: int


def successive_halving(
    trials: int, rounds: int, factor: int = 3, least: int = 1
) -> tuple[Rung, ...]:
    """Rungs with ever fewer trials and ever more rounds; the last has all ``rounds``.

    One in ``factor`` goes on, and no rung is below ``least`` rounds. With one trial, or too few
    rounds to halve, there is one rung. Raises :class:`ConfigurationError` for what cannot be.
    """
    if trials < 1 or not 1 <= least <= rounds or factor < 2:
        raise ConfigurationError(
            f"successive halving needs a trial, a factor of at least 2 and from 1 to {rounds} "
            f"rounds at first; not {trials} trials, factor {factor} and {least} rounds"
        )
    halvings = 0
    while factor ** (halvings + 1) <= trials and least * factor ** (halvings + 1) <= rounds:
        halvings += 1
    return tuple(
        Rung(trials // factor**rung, rounds // factor ** (halvings - rung))
        for rung in range(halvings + 1)
    )


def survivors(scores: Sequence[float], keep: int) -> list[int]:
    """Positions of the ``keep`` lowest scores, lowest first.

    Equal scores go by position. NaN, of a trial that failed, is worse than any number.
    """

    def badness(position: int) -> tuple[bool, float, int]:
        score = scores[position]
        failed = math.isnan(score)
        return failed, 0.0 if failed else score, position

    return sorted(range(len(scores)), key=badness)[:keep]
