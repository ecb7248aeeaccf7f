"""Lets the Python reference show docstrings, whose roles are Sphinx's, as Markdown."""

from __future__ import annotations

from typing import Any

import griffe

from tools.docs.markdown import plain


class PlainRoles(griffe.Extension):
    """``:class:`Engine``` becomes ```Engine``` in every docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring, as soon as its object was read."""
        if obj.docstring is not None:
            obj.docstring.value = plain(obj.docstring.value)
