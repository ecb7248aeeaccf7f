"""The text of an answer on the page, as it is written."""

from __future__ import annotations

import re
from functools import lru_cache

import markdown2
from nicegui import ui

_EXTRAS = ("fenced-code-blocks", "tables", "break-on-newline", "cuddled-lists")
_PICTURE = re.compile(r"<img\b[^>]*>")
_ALT = re.compile(r'\balt="([^"]*)"')


class ReplyText(ui.element, component="reply.js"):
    """Shows ``text`` and what is added to it; formatted as Markdown once it is complete."""

    def __init__(self, text: str, running: bool) -> None:
        super().__init__()
        self.text = text
        with self._props.suspend_updates():
            self._props["text"] = text
            self._props["running"] = running
            self._props["html"] = "" if running else formatted(text)

    def show(self, text: str, running: bool) -> None:
        """Bring the browser up to date. Only what is new is sent."""
        if text != self.text:
            start = len(self.text) if text.startswith(self.text) else 0
            self.text = text
            with self._props.suspend_updates():
                self._props["text"] = text  # for a browser that comes back
            self.run_method("append", utf16_length(text[:start]), text[start:])
        if self._props["running"] and not running:
            self._props["html"] = formatted(text)
            self._props["running"] = False


@lru_cache(maxsize=512)
def formatted(text: str) -> str:
    """Markdown as HTML. The browser sanitises it; tags in the text are shown, not obeyed.

    A picture becomes its description: what a model wrote must make no browser fetch anything.
    """
    html = str(markdown2.markdown(text, extras=list(_EXTRAS), safe_mode="escape"))
    return _PICTURE.sub(lambda found: (_ALT.search(found[0]) or ("", ""))[1], html)


def utf16_length(text: str) -> int:
    """Length as JavaScript counts."""
    return len(text.encode("utf-16-le", "surrogatepass")) // 2
