"""Small things that several pages show: badges, facts, notices, tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from nicegui import ui

from anabranch.console.text import NONE
from anabranch.errors import AnabranchError

_TONES = {
    "running": "live",
    "succeeded": "good",
    "finished": "good",
    "holds": "good",
    "failed": "bad",
    "damaged": "bad",
    "falls short": "bad",
    "paused": "warn",
    "unfinished": "warn",
    "stopped": "warn",
}


class Badge(ui.label):
    """A state in one word; the word says what the colour says."""

    def __init__(self, state: str) -> None:
        super().__init__(state)
        self.classes("badge " + _TONES.get(state, ""))

    def show(self, state: str) -> None:
        """Another state."""
        if state != self.text:
            self.text = state
            self.classes(replace="badge " + _TONES.get(state, ""))


def facts(values: Mapping[str, str]) -> ui.element:
    """Names and values side by side."""
    with ui.element("dl").classes("facts") as made:
        for name, value in values.items():
            with ui.element("div"):
                with ui.element("dt"):
                    ui.label(name)
                with ui.element("dd"):
                    ui.label(value)
    return made


class Tile:
    """A number with its name."""

    def __init__(self, name: str, value: str = NONE, hidden: bool = False) -> None:
        with ui.element("div").classes("card tile") as card:
            self.value = ui.label(value).classes("value")
            ui.label(name).classes("name")
        card.set_visibility(not hidden)


class Bar:
    """How much is done, 0 to 1; None hides it."""

    def __init__(self, name: str, fraction: float | None) -> None:
        self._outer = ui.element("div").classes("bar")
        self._outer.props(f'role=progressbar aria-label="{name}" aria-valuemin=0 aria-valuemax=100')
        with self._outer:
            self._inner = ui.element("div")
        self.show(fraction)

    def show(self, fraction: float | None) -> None:
        """Move it."""
        percent = round(100 * (fraction or 0))
        self._outer.set_visibility(fraction is not None)
        if self._outer._props.get("aria-valuenow") != percent:
            self._outer.props(f"aria-valuenow={percent}")
            self._inner.style(f"width: {percent}%")


class Notice:
    """A line that says what went wrong or right; not there while there is nothing to say."""

    def __init__(self) -> None:
        self.label = ui.label().classes("notice").props("role=alert")
        self.clear()

    def wrong(self, error: AnabranchError | str) -> None:
        """Show an error's own words: they say what to do."""
        self._show(str(error), "bad")

    def right(self, message: str) -> None:
        """Show that it worked."""
        self._show(message, "good")

    def clear(self) -> None:
        """Say nothing."""
        self.label.set_visibility(False)
        self.label.text = ""

    def _show(self, message: str, tone: str) -> None:
        self.label.text = message
        self.label.classes(remove="good bad", add=tone)
        self.label.set_visibility(True)


@contextmanager
def dialog(title: str) -> Iterator[ui.dialog]:
    """A question that has to be answered first; its content is made inside."""
    with ui.dialog(value=True) as asked, ui.card():
        asked._props["aria-label"] = title
        with ui.element("h2"):
            ui.label(title).classes("break")
        yield asked


def empty(title: str, what_to_do: str) -> None:
    """What a page shows when it has nothing, and how that changes."""
    with ui.element("div").classes("card empty"):
        ui.label(title).classes("big")
        ui.label(what_to_do)


@contextmanager
def table(columns: Sequence[str], label: str, right: int = 0) -> Iterator[ui.element]:
    """A table that scrolls sideways where it is too wide; rows are made inside its body.

    The last ``right`` columns are numbers and stand to the right.
    """
    with (
        ui.element("div").classes("scroll").props(f'tabindex=0 role=region aria-label="{label}"'),
        ui.element("table").classes("plain"),
    ):
        with ui.element("thead"), ui.element("tr"):
            for place, column in enumerate(columns, start=right - len(columns)):
                with ui.element("th").props("scope=col").classes("right" if place >= 0 else ""):
                    ui.label(column)
        with ui.element("tbody") as body:
            yield body


def row(*cells: str, classes: Sequence[str] = ()) -> list[ui.element]:
    """A row of texts; ``classes`` belong to the cells in order. Returns the cells."""
    made = []
    with ui.element("tr"):
        for index, text in enumerate(cells):
            with ui.element("td").classes(classes[index] if index < len(classes) else "") as cell:
                if text:
                    ui.label(text)
            made.append(cell)
    return made
