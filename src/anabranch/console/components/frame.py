"""What surrounds every page: navigation, colours, and where the content goes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from nicegui import ui

from anabranch.console.components.icons import BRAND, icon
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

_NEXT_THEME = f"""() => {{
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
    theme = client.request.cookies.get(THEME)
    ui.dark_mode({"light": False, "dark": True}.get(theme or ""))
    ui.add_head_html(f"<style>{style()}</style>")
    # Inside the <main> that NiceGUI's page is.
    main = ui.element("div").classes(f"page {classes}").props("id=content tabindex=-1")
    ui.skip_link("Skip to the content", target=main)
    with ui.element("div").classes("side"):
        with ui.element("a").classes("brand").props(f'href="{root}/"'):
            ui.html(BRAND, sanitize=False, tag="span").style("display: inline-flex")
            ui.label("Anabranch")
        with ui.element("nav").props('aria-label="Pages"'):
            for name, drawing, label in PAGES:
                with ui.element("a").props(f'href="{root}/{name}"') as link:
                    icon(drawing)
                    ui.label(label)
                if name == here:
                    link.props('aria-current="page"')
        _foot(console, root)
    with main:
        yield main
        if here:  # the chat page ends with what is written
            _foot(console, root)


def _foot(console: Console, root: str) -> None:
    """In the side bar, or below the content where that is a bar of pages only."""
    with ui.element("div").classes("side-foot"):
        button("Light or dark", "theme").on("click", js_handler=_NEXT_THEME)
        if console.sessions.needs_key:
            with ui.element("form").props(f'method="post" action="{root}/sign-out"'):
                button("Sign out", "out").props("type=submit")


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
