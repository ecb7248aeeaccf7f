"""Who worked when and in which group: the tasks of a run as bars.

What :meth:`Compass.timeline` gives, as plain data; :mod:`.timeline_plot` draws it::

    group 3   due 12.0  latest 14.0
      client-0   began 8.0   ended 11.9   arrived   100 steps
      client-4   began 9.5   ended 12.1   arrived    24 steps
      client-7   began 8.2   ended 14.6   late       30 steps
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

How = Literal["working", "arrived", "late", "failed"]
"""How a task stands: ``late`` came after its group was closed, ``failed`` had no usable reply."""


@dataclass(frozen=True)
class Bar:
    """A task. Times are seconds of the run.

    A client's first task is in no group: ``group`` is empty, ``due`` and ``latest`` are None.
    ``due`` is when the whole group should be there, ``latest`` when it is not waited for any more.
    """

    client: str
    group: str
    steps: int
    began: float
    due: float | None = None
    latest: float | None = None
    ended: float | None = None
    how: How = "working"


@dataclass(frozen=True)
class Group:
    """Bars of one group. ``closed`` is None as long as it waits for someone."""

    name: str
    due: float
    latest: float
    closed: float | None
    bars: Sequence[Bar]

    @property
    def began(self) -> float:
        """When the first member did."""
        return min(bar.began for bar in self.bars)

    @property
    def spread(self) -> float:
        """Seconds between the first and the last arrival on time, 0 without two of them."""
        times = [bar.ended for bar in self.bars if bar.how == "arrived" and bar.ended is not None]
        return max(times) - min(times) if times else 0.0


@dataclass(frozen=True)
class Timeline:
    """All tasks so far, in the order in which they began."""

    bars: Sequence[Bar]

    @property
    def clients(self) -> list[str]:
        """Whoever had a task, sorted."""
        return sorted({bar.client for bar in self.bars})

    @property
    def until(self) -> float:
        """The last time that is known: tasks that are under way go on at least until then."""
        return max((max(bar.began, bar.ended or 0.0) for bar in self.bars), default=0.0)

    @property
    def groups(self) -> list[Group]:
        """In the order in which they began; first tasks are in none."""
        members: dict[str, list[Bar]] = {}
        for bar in self.bars:
            if bar.group:
                members.setdefault(bar.group, []).append(bar)
        return [_group(name, bars, self.until) for name, bars in members.items()]

    def count(self, how: How) -> int:
        """How many tasks are, or ended, like this."""
        return sum(bar.how == how for bar in self.bars)

    def to_list(self) -> list[dict[str, Any]]:
        """JSON values."""
        return [asdict(bar) for bar in self.bars]

    @classmethod
    def from_list(cls, rows: Iterable[Mapping[str, Any]]) -> Timeline:
        """What :meth:`to_list` gave, also after JSON."""
        return cls([Bar(**row) for row in rows])


def _group(name: str, bars: Sequence[Bar], until: float) -> Group:
    due, latest = bars[0].due, bars[0].latest
    assert due is not None and latest is not None
    ends = [bar.ended for bar in bars if bar.ended is not None]
    if len(ends) == len(bars):
        return Group(name, due, latest, min(latest, max(ends)), bars)
    return Group(name, due, latest, latest if until >= latest else None, bars)
