"""How long work on a model reports where it stands."""

from __future__ import annotations

from collections.abc import Callable

PROGRESS_FILE = "ANABRANCH_PROGRESS"
"""Environment variable: a file to which commands write how far they are, for programs: an object
with ``message`` and ``fraction`` a line."""

Progress = Callable[[str, float | None], None]
"""``progress(message, fraction)``; the fraction of the whole is 0 to 1, or None when unknown."""


def silent(message: str, fraction: float | None) -> None:
    """The callback that reports nothing."""


def within(progress: Progress, low: float, high: float) -> Progress:
    """A callback for one stage of the work: its fraction 0 to 1 covers ``low`` to ``high``."""

    def report(message: str, fraction: float | None) -> None:
        progress(message, None if fraction is None else low + fraction * (high - low))

    return report
