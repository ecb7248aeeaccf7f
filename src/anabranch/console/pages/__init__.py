"""One file a page. A page arranges what the console offers; it decides nothing."""

from __future__ import annotations

from anabranch.console.console import Console
from anabranch.console.pages import (
    chat,
    claims,
    downloads,
    engine,
    federation,
    jobs,
    models,
    sign_in,
)


def register(console: Console) -> None:
    """Make the pages' routes, in place of those of an earlier call."""
    for page in (sign_in, downloads, chat, models, jobs, engine, federation, claims):
        page.register(console)
