"""The form that asks for an API key. Plain HTML: it works before anything else does."""

from __future__ import annotations

from html import escape
from urllib.parse import parse_qs

from nicegui import core
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from anabranch.console.components.frame import style
from anabranch.console.components.icons import BRAND
from anabranch.console.console import Console
from anabranch.console.sessions import COOKIE

MOST_BYTES = 4096

_WRONG = (
    "This is not one of the server's API keys. They are in the file that was given to "
    "--api-key-file; whoever runs the server has it."
)

_FORM = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Sign in · Anabranch</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}
@media (prefers-color-scheme: dark) {{ :root {{ --paper: #0f1413; --card: #161c1b; --ink: #e7edeb;
  --dim: #9caaa6; --line: #2b3533; --accent: #56c5b9; --on-accent: #05211e; --bad: #ff958b;
  --bad-soft: #3a1d1a; }} }}
html {{ overflow: auto; background: var(--paper); }} body {{ margin: 0; }}</style></head>
<body><main class="sign-in"><form class="card" method="post">
<div class="brand" style="padding: 0">{brand}<span>Anabranch</span></div>
<h1>Sign in with your API key</h1>
<p class="dim">It is checked here and not kept; this browser gets a cookie that lasts until the
server stops.</p>{problem}
<label for="key">API key</label>
<input id="key" name="key" type="password" autocomplete="current-password" required autofocus>
<input type="hidden" name="next" value="{target}">
<button type="submit">Sign in</button></form></main></body></html>"""


def register(console: Console) -> None:
    """``/sign-in`` and ``/sign-out``."""
    for path in ("/sign-in", "/sign-out"):
        core.app.remove_route(path)

    @core.app.get("/sign-in", include_in_schema=False)
    async def form(request: Request) -> Response:
        return _page(request.query_params.get("next", "/"))

    @core.app.post("/sign-in", include_in_schema=False)
    async def sign_in(request: Request) -> Response:
        given = parse_qs((await request.body())[:MOST_BYTES].decode("utf-8", "replace"))
        target = given.get("next", ["/"])[0]
        cookie = console.sessions.sign_in(given.get("key", [""])[0])
        if cookie is None:
            return _page(target, _WRONG)
        root = request.scope.get("root_path", "")
        answer = RedirectResponse(root + _own(target), status_code=303)
        answer.set_cookie(
            COOKIE,
            cookie,
            path=root or "/",
            httponly=True,
            samesite="strict",
            secure=request.url.scheme == "https",
        )
        return answer

    @core.app.post("/sign-out", include_in_schema=False)
    async def sign_out(request: Request) -> Response:
        console.sessions.sign_out(request)
        root = request.scope.get("root_path", "")
        return RedirectResponse(f"{root}/sign-in", status_code=303)


def _page(target: str, problem: str = "") -> HTMLResponse:
    notice = f'<p class="notice bad" role="alert">{problem}</p>' if problem else ""
    html = _FORM.format(style=style(), brand=BRAND, problem=notice, target=escape(_own(target)))
    headers = {"cache-control": "no-store", "x-frame-options": "DENY"}
    return HTMLResponse(html, 401 if problem else 200, headers)


def _own(target: str) -> str:
    """A path of ours: nobody is led to another host."""
    return target if target.startswith("/") and target[1:2] not in ("/", "\\") else "/"
