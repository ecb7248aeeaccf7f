"""Numbers, sizes and times as people read them."""

from __future__ import annotations

import time
from datetime import datetime

from anabranch.cli.output import bytes_text, count_text

NONE = "\N{EN DASH}"
"""Where there is no number."""


def seconds_text(seconds: float | None) -> str:
    """``"87 ms"``, ``"1.4 s"``, ``"3 min 20 s"``, ``"2 h 5 min"``; a dash for None."""
    if seconds is None:
        return NONE
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def ago_text(moment: float, now: float | None = None) -> str:
    """``"just now"``, ``"5 min ago"``, ``"3 h ago"``, then the date."""
    passed = (time.time() if now is None else now) - moment
    if passed < 60:
        return "just now"
    if passed < 3600:
        return f"{passed // 60:.0f} min ago"
    if passed < 86400:
        return f"{passed // 3600:.0f} h ago"
    return datetime.fromtimestamp(moment).strftime("%d %b %Y")


def ago_iso_text(moment: str) -> str:
    """The same for a time in ISO 8601."""
    return ago_text(datetime.fromisoformat(moment).timestamp())


def clock_text(moment: float) -> str:
    """Time of day on the server."""
    return datetime.fromtimestamp(moment).strftime("%H:%M:%S")


def share_text(share: float | None) -> str:
    """``"43 %"``; a dash for None."""
    return NONE if share is None else f"{share:.0%}".replace("%", " %")


__all__ = [
    "NONE",
    "ago_iso_text",
    "ago_text",
    "bytes_text",
    "clock_text",
    "count_text",
    "seconds_text",
    "share_text",
]
