"""What surrounds every page: navigation, colours, and where the content goes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from nicegui import ui

from anabranch.console.components.icons import BRAND, icon, markup
from anabranch.console.console import Console

THEME = "anabranch_theme"
"""The cookie with ``light`` or ``dark``; without it the page follows the system."""

PAGES = (
    ("", "chat", "Chat"),
    ("models", "models", "Models"),
    ("jobs", "jobs", "Jobs"),
    ("engine", "engine", "Engine"),
    ("federation", "federation", "Federation"),
    ("claims", "claims", "Claims"),
)

_CURRENT = ' aria-current="page"'
_SYSTEM_IS_DARK = "matchMedia('(prefers-color-scheme: dark)').matches"
_NEXT_THEME = f"""function nextTheme() {{
  const dark = document.body.classList.contains("body--dark");
  const chosen = dark ? "light" : "dark";
  document.cookie = "{THEME}=" + chosen + "; path=/; max-age=31536000; samesite=lax";
  setDark(!dark);
}}"""


@contextmanager
def frame(console: Console, here: str, title: str, classes: str = "") -> Iterator[ui.element]:
    """The page ``here`` (a name of :data:`PAGES`); what is made inside is its content."""
    client = ui.context.client
    client.title = f"{title} · Anabranch"
    root = client.request.scope.get("root_path", "")
    dark = {"light": False, "dark": True}.get(client.request.cookies.get(THEME, ""))
    ui.dark_mode(dark)
    ui.add_head_html(f"<style>{style()}</style>")
    ui.add_body_html(_side(here, root, dark, console.sessions.needs_key))
    # Inside the <main> that NiceGUI's page is.
    with ui.element("div").classes(f"page {classes}").props("id=content tabindex=-1") as main:
        yield main
        if here:  # the chat page ends with what is written
            ui.html(_foot(root, console.sessions.needs_key), sanitize=False)


def _side(here: str, root: str, dark: bool | None, needs_key: bool) -> str:
    """The side bar as plain HTML: it is there before any script has run."""
    links = "".join(
        f'<a href="{root}/{name}"{_CURRENT if name == here else ""}>{markup(drawing)}'
        f"<div>{label}</div></a>"
        for name, drawing, label in PAGES
    )
    is_dark = _SYSTEM_IS_DARK if dark is None else str(dark).lower()
    return (
        f"<script>document.body.classList.add({is_dark} ? 'body--dark' : 'body--light');"
        f"{_NEXT_THEME}</script>"
        f'<a class="nicegui-skip-link" href="#content">Skip to the content</a>'
        f'<header class="side"><a class="brand" href="{root}/">{BRAND}<div>Anabranch</div></a>'
        f'<nav aria-label="Pages">{links}</nav>{_foot(root, needs_key)}</header>'
    )


def _foot(root: str, needs_key: bool) -> str:
    """In the side bar, or below the content where that is a bar of pages only."""
    sign_out = (
        f'<form method="post" action="{root}/sign-out">'
        f'<button type="submit" class="q-btn quiet">{_labelled("out", "Sign out")}</button></form>'
    )
    return (
        f'<div class="side-foot"><button type="button" class="q-btn quiet" onclick="nextTheme()">'
        f"{_labelled('theme', 'Light or dark')}</button>{sign_out if needs_key else ''}</div>"
    )


def _labelled(drawing: str, text: str) -> str:
    return (
        f'<span class="across" style="gap: 8px; flex-wrap: nowrap">{markup(drawing)}{text}</span>'
    )


@contextmanager
def heading(title: str, explanation: str = "") -> Iterator[None]:
    """The page's title; what is made inside stands to its right."""
    with ui.element("div").classes("page-head"):
        with ui.element("h1"):
            ui.label(title)
        ui.element("div").classes("grow")
        yield
        if explanation:
            ui.label(explanation).classes("sub")


def button(text: str, drawing: str = "", kind: str = "quiet") -> ui.button:
    """A button with an icon; ``kind`` is main, plain, quiet or danger."""
    made = ui.button(color=None).props("flat no-caps").classes(kind)
    with made, ui.element("span").classes("across").style("gap: 8px; flex-wrap: nowrap"):
        if drawing:
            icon(drawing)
        ui.label(text)
    return made


def download_link(name: str, address: str, size: str = "") -> ui.element:
    """A link that looks like a button, maybe a ``small`` one, and saves what is at ``address``."""
    with ui.element("a").classes(f"q-btn plain {size}").mark("download") as link:
        link._props |= {"href": address, "download": True, "aria-label": f"Download {name}"}
        with ui.element("span").classes("across").style("gap: 8px; flex-wrap: nowrap"):
            icon("download")
            ui.label("Download")
    return link


def icon_button(name: str, drawing: str, kind: str = "quiet") -> ui.button:
    """A round button whose name only screen readers and the pointer are told."""
    made = ui.button(color=None).props(f'flat aria-label="{name}" title="{name}"')
    made.classes(f"{kind} round")
    with made:
        icon(drawing)
    return made


@cache
def style() -> str:
    """The style sheet."""
    return (Path(__file__).parent / "style.css").read_text("utf-8")
