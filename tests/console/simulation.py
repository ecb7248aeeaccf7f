"""A visitor of the console without a browser or a socket, by NiceGUI's own user simulation."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest

pytest.importorskip("nicegui", reason="the extra `console` is not installed")

from nicegui import Client, ui
from nicegui.functions.download import download
from nicegui.functions.navigate import Navigate
from nicegui.functions.notify import notify
from nicegui.testing.general import nicegui_reset_globals
from nicegui.testing.user import User

from anabranch.api import ServerOptions, create_app
from anabranch.console import ConsoleOptions, install
from anabranch.console.console import Console
from anabranch.jobs import Workspace
from anabranch.models.protocol import Model
from tests.api.conftest import EchoModel

# NiceGUI looks at every object between tests; torch's half a million are none of its own.
gc.collect()
gc.freeze()

Element = TypeVar("Element", bound=ui.element)


def shown(element: ui.element) -> bool:
    return element.visible and all(each.visible for each in element.ancestors())


class Visitor(User):
    async def open(self, path: str, **options: Any) -> Client:
        """As in a browser, a path that a page leads to begins where the console does."""
        return await super().open(f"/console{path.removeprefix('/console')}", **options)


@dataclass
class Visit:
    """A server with its console, and somebody who looks at it."""

    user: User
    http: httpx.AsyncClient
    console: Console

    async def open(self, path: str = "") -> None:
        await self.user.open(f"/console/{path}")

    def one(self, kind: type[Element], marker: str | None = None) -> Element:
        """The only visible element of a kind, or of its marker."""
        found = list(self.user.find(kind=kind, marker=marker).elements)
        assert len(found) == 1, found
        return found[0]

    def has(self, marker: str) -> bool:
        """Whether something with the marker is visible."""
        with self.user:
            elements = ui.context.client.elements.values()
            return any(marker in each._markers and shown(each) for each in elements)

    def texts(self, kind: type[ui.element] = ui.label) -> list[str]:
        with self.user:
            return [
                element.text
                for element in ui.context.client.elements.values()
                if isinstance(element, kind) and shown(element)
            ]

    async def until(self, condition: Callable[[], Any], seconds: float = 5.0) -> None:
        deadline = asyncio.get_running_loop().time() + seconds
        while not condition():
            assert asyncio.get_running_loop().time() < deadline, self.texts()
            await asyncio.sleep(0.01)

    async def sees(self, text: str, seconds: float = 5.0) -> None:
        """Wait until a visible label has the text in it."""
        await self.until(lambda: any(text in each for each in self.texts()), seconds)


Story = Callable[[Visit], Awaitable[None]]


def visit(
    story: Story,
    *models: Model,
    workspace: Workspace | None = None,
    runs: Path | None = None,
    **options: Any,
) -> None:
    """Let somebody live through a story on a server with these models."""

    async def live() -> None:
        server_options = ServerOptions(workspace=workspace, **options)
        async with visiting(models or (EchoModel(),), server_options, runs) as started:
            await story(started)

    asyncio.run(live())


@asynccontextmanager
async def visiting(
    models: tuple[Model, ...], options: ServerOptions, runs: Path | None
) -> AsyncIterator[Visit]:
    with nicegui_reset_globals():
        os.environ["NICEGUI_USER_SIMULATION"] = "true"
        try:
            app = create_app(models, options)
            console = install(app, ConsoleOptions(runs or Path("no-runs-here")))
            transport = httpx.ASGITransport(app)
            async with (
                app.router.lifespan_context(app),
                httpx.AsyncClient(transport=transport, base_url="http://test") as client,
            ):
                yield Visit(Visitor(client), client, console)
        finally:
            os.environ.pop("NICEGUI_USER_SIMULATION", None)
            ui.navigate, ui.notify, ui.download = Navigate(), notify, download
            Client.page_routes.clear()  # or the modules of the pages would be forgotten
