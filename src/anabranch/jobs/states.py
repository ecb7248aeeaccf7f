"""The states of a job, and which may follow which.

::

    queued ---> running ---> succeeded | failed
      |  ^       |   ^
      v  |       v   |
     paused <----+---+            and from each of these three to failed or cancelled
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from anabranch.jobs.errors import ForbiddenTransition

State = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]

FINISHED: frozenset[State] = frozenset({"succeeded", "failed", "cancelled"})

TRANSITIONS: Mapping[State, frozenset[State]] = {
    "queued": frozenset({"running", "paused", "failed", "cancelled"}),
    "running": frozenset({"paused", "succeeded", "failed", "cancelled"}),
    "paused": frozenset({"queued", "running", "failed", "cancelled"}),
    "succeeded": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
}


def allowed(before: State, after: State) -> bool:
    """Whether a job may go from one state to the other; staying where it is always may."""
    return before == after or after in TRANSITIONS[before]


def require(job_id: str, before: State, after: State) -> None:
    """Raise :class:`ForbiddenTransition` unless the step is allowed."""
    if not allowed(before, after):
        possible = ", ".join(sorted(TRANSITIONS[before])) or "none: it is finished"
        raise ForbiddenTransition(
            f"job {job_id} is {before} and cannot become {after}; possible: {possible}"
        )
