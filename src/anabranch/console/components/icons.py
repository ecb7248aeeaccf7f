"""The console's icons: line drawings on a grid of 24, in the colour of the text around them."""

from __future__ import annotations

from nicegui import ui

_PATHS = {
    "chat": "M4 5.5h16v11h-9l-4.5 4v-4H4z",
    "models": "M12 3l8 4.5v9L12 21l-8-4.5v-9zM4 7.5l8 4.5 8-4.5M12 12v9",
    "jobs": "M4 6h10M4 12h16M4 18h7M18 4v4M18 16v4M16 18h4",
    "engine": "M4 17a8 8 0 1 1 16 0M12 17l4-6M4 17h2M18 17h2",
    "federation": "M12 7.5v4m-1.5 1.5l-4 3.5m7-3.5l4 3.5"
    "M12 3a2.2 2.2 0 1 0 0 4.4 2.2 2.2 0 0 0 0-4.4"
    "M5 16a2.2 2.2 0 1 0 0 4.4A2.2 2.2 0 0 0 5 16zM19 16a2.2 2.2 0 1 0 0 4.4 2.2 2.2 0 0 0 0-4.4z",
    "claims": "M6 3h12v18l-6-3.5L6 21zM9 9.5l2.2 2.2L15.5 8",
    "send": "M12 19V5M6 11l6-6 6 6",
    "stop": "M7 7h10v10H7z",
    "plus": "M12 5v14M5 12h14",
    "tune": "M4 7h9M17 7h3M4 17h3M11 17h9M15 5v4M9 15v4",
    "compare": "M4 5h7v14H4zM13 5h7v14h-7z",
    "copy": "M8 8h11v12H8zM5 16V4h11",
    "again": "M5 12a7 7 0 1 1 2.5 5.4M5 18v-4.5h4.5",
    "download": "M12 4v11M7 11l5 5 5-5M5 20h14",
    "theme": "M12 4a8 8 0 1 0 0 16zM12 4a8 8 0 0 1 0 16",
    "back": "M14 6l-6 6 6 6",
    "out": "M10 5H5v14h5M14 8l4 4-4 4M18 12H9",
}

BRAND = (
    '<svg viewBox="0 0 24 24" fill="none" stroke="currentColor" stroke-width="2.2" '
    'stroke-linecap="round" aria-hidden="true"><path d="M3 12h4c3 0 3-6 6-6s4 6 8 6"/>'
    '<path d="M7 12c3 0 3 6 6 6s4-6 8-6" opacity=".55"/></svg>'
)
"""A stream that leaves a river and joins it again."""


def markup(name: str) -> str:
    """The drawing as SVG; hidden from screen readers, which have the text beside it."""
    return (
        f'<svg class="icon" viewBox="0 0 24 24" fill="none" stroke="currentColor" '
        f'stroke-width="1.8" stroke-linecap="round" stroke-linejoin="round" aria-hidden="true">'
        f'<path d="{_PATHS[name]}"/></svg>'
    )


def icon(name: str) -> ui.html:
    """The drawing as an element."""
    return ui.html(markup(name), sanitize=False, tag="span").style("display: inline-flex")
