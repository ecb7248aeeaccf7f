"""Puts the console on a server's app."""

from __future__ import annotations

import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.middleware.gzip import DEFAULT_EXCLUDED_CONTENT_TYPES, GZipMiddleware
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp

from anabranch.api.middleware.api_keys import CONSOLE
from anabranch.console.options import ConsoleOptions
from anabranch.errors import MissingExtra

if TYPE_CHECKING:
    from anabranch.console.console import Console

RECONNECT_SECONDS = 30.0
"""How long a page outlives its connection: a laptop that sleeps for longer loads it anew."""


def install(app: FastAPI, options: ConsoleOptions | None = None) -> Console:
    """Serve the console at ``/console/`` and lead ``/`` there. Once for a process.

    Raises :class:`MissingExtra` without NiceGUI.
    """
    try:
        from nicegui import core, ui
    except ImportError:
        raise MissingExtra("nicegui", "console") from None
    from anabranch.console import pages
    from anabranch.console.console import Console

    # It looks at every object of the process for its server, and torch warns of an old one.
    warnings.filterwarnings("ignore", category=FutureWarning, module="nicegui")
    console = Console(app.state.service, options)
    core.app.config.socket_io_js_transports = ["websocket"]  # polling would count as requests
    core.app.config.quasar_config["loadingBar"] = {"skipHijack": True}  # pages say how far they are
    # The app's own life lies inside the console's, which NiceGUI wraps around it.
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with inner(app), console.running():
            yield

    app.router.lifespan_context = lifespan
    app.add_api_route("/", _to_console, include_in_schema=False)
    app.add_api_route(CONSOLE, _to_console, include_in_schema=False)
    pages.register(console)
    ui.run_with(
        app,
        mount_path=CONSOLE,
        title="Anabranch",
        favicon=FAVICON,
        language="en-US",
        dark=None,
        tailwind=False,
        reconnect_timeout=RECONNECT_SECONDS,
        binding_refresh_interval=None,
        show_welcome_message=False,
        gzip_middleware_factory=_compressed,
    )
    return console


def _compressed(app: ASGIApp) -> GZipMiddleware:
    """5 % more bytes for a third of the time (Quasar: 9 instead of 22 ms); downloads stay whole."""
    excluded = (*DEFAULT_EXCLUDED_CONTENT_TYPES, "application/octet-stream")
    return GZipMiddleware(app, compresslevel=4, exclude_content_types=excluded)


async def _to_console() -> RedirectResponse:
    return RedirectResponse(f"{CONSOLE}/")


FAVICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24" fill="none" stroke="#0a8080" '
    'stroke-width="2.4" stroke-linecap="round"><path d="M3 12h4c3 0 3-6 6-6s4 6 8 6"/>'
    '<path d="M7 12c3 0 3 6 6 6s4-6 8-6" opacity=".55"/></svg>'
)
