"""Only who may see a page gets one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from urllib.parse import quote

from nicegui import ui
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from anabranch.console.console import Console
from anabranch.console.sessions import Visitor

Build = Callable[[Request, Visitor], Awaitable[None]]


def page(console: Console, path: str) -> Callable[[Build], Build]:
    """Register ``build(request, visitor)`` at a path below the console's.

    Who has not signed in, where that is needed, is led to the form and back.
    """

    def decorate(build: Build) -> Build:
        # A page's own time limit is for slow machines only: nothing here waits for an engine.
        @ui.page(path, response_timeout=30.0)
        async def route(request: Request) -> Response | None:
            visitor = console.sessions.visitor(request)
            if visitor is None:
                root = request.scope.get("root_path", "")
                target = request.url.path.removeprefix(root) or "/"
                if request.url.query:
                    target += f"?{request.url.query}"
                return RedirectResponse(f"{root}/sign-in?next={quote(target)}", status_code=303)
            await build(request, visitor)
            return None

        return build

    return decorate


def until_left(unwatch: Callable[[], None]) -> None:
    """End a subscription when the page that is being built is gone."""
    ui.context.client.on_delete(lambda: unwatch())


def root_path() -> str:
    """The path below which the console lies, for links; ``ui.navigate`` adds it by itself."""
    return str(ui.context.client.request.scope.get("root_path", ""))


__all__ = ["page", "root_path", "until_left"]
