"""Chat: one model or two side by side, with everything that the API can be asked for."""

from __future__ import annotations

import json
from collections.abc import Callable

from nicegui import ui
from starlette.requests import Request

from anabranch.console.components.frame import button, frame, heading, icon_button
from anabranch.console.components.pieces import Notice
from anabranch.console.components.transcript import Transcript
from anabranch.console.console import Console
from anabranch.console.conversation import Conversation, Settings, Shape
from anabranch.console.pages.access import page, until_left
from anabranch.console.sessions import Visitor
from anabranch.errors import AnabranchError

SHAPES: dict[Shape, str] = {
    "text": "Any text",
    "json_object": "A JSON object",
    "json_schema": "JSON of a schema",
    "regex": "Text of a pattern",
    "choice": "One of several",
}
EXAMPLES: dict[Shape, str] = {
    "json_schema": '{"type": "object", "properties": {"city": {"type": "string"}, '
    '"population": {"type": "integer"}}, "required": ["city", "population"]}',
    "regex": "[A-Z][a-z]+, [0-9]{4}",
    "choice": "positive\nneutral\nnegative",
}
TRIES = (
    "What is the capital of France?",
    "Explain in three sentences why rivers meander.",
    "Write a short poem about a side channel.",
)
LOST = "This conversation is no longer in the server's memory; here is a new one."

_REMEMBER = """
history.replaceState(null, "", "?chat=" + {id});
sessionStorage.setItem("anabranch_chat", {id});
"""
# Before anything is drawn: the tab's own conversation instead of a new one.
_RETURN = """<script>{
  const asked = new URLSearchParams(location.search);
  const kept = sessionStorage.getItem("anabranch_chat");
  if (kept && !asked.has("chat") && !asked.has("model") && !asked.has("new"))
    location.replace("?chat=" + kept);
}</script>"""
_SEND_ON_ENTER = """(event) => {
  if (event.shiftKey || event.isComposing) return;
  event.preventDefault();
  emit();
}"""


def register(console: Console) -> None:
    """``/``: ``?chat=ID`` an earlier conversation, ``?model=NAME`` a new one with this model."""

    @page(console, "/")
    async def chat(request: Request, visitor: Visitor) -> None:
        asked = request.query_params
        found = console.conversations.get(asked.get("chat", ""), visitor.owner)
        conversation = found or console.conversations.new(visitor.owner, asked.get("model"))
        ui.add_head_html(_RETURN)
        ui.run_javascript(_REMEMBER.format(id=json.dumps(conversation.id)))
        with frame(console, "", "Chat", "chat narrow"):
            ChatView(console, conversation, lost="chat" in asked and found is None)


class ChatView:
    """One tab's view of a conversation."""

    def __init__(self, console: Console, conversation: Conversation, lost: bool) -> None:
        self._console = console
        self._conversation = conversation
        self._names = [model.name for model in console.service.listed()]
        settings = conversation.settings
        with heading("Chat"):
            self._pickers(settings)
        self._settings = SettingsPanel(settings)
        self._welcome = self._make_welcome()
        self._transcript = Transcript(conversation, self._guarded(conversation.ask_again))
        with ui.element("div").classes("composer"):
            self._notice = Notice()
            self._make_composer()
        if lost:
            self._notice.right(LOST)
        self.show(conversation)
        until_left(conversation.watchers.add(self.show))

    def show(self, conversation: Conversation) -> None:
        """Bring the page up to date."""
        self._welcome.set_visibility(not conversation.turns)
        self._send.set_visibility(not conversation.running)
        self._stop.set_visibility(conversation.running)
        self._transcript.show()

    def _pickers(self, settings: Settings) -> None:
        for side in range(2):
            name = settings.models[side] if side < len(settings.models) else self._other()
            pick = ui.select(self._known(name), value=name, label="Model" if not side else "Beside")
            pick.props("outlined dense options-dense").classes("pick")
            pick.on_value_change(lambda event, side=side: self._choose(side, event.value))
            pick.mark(f"model-{side}")
            if side:
                self._second = pick
        self._second.set_visibility(len(settings.models) > 1)
        compare = icon_button("Two models side by side", "compare", "plain").mark("compare")
        compare.on_click(self._toggle_compare)
        icon_button("Settings", "tune", "plain").mark("settings").on_click(
            lambda: self._settings.toggle()
        )
        new = icon_button("New chat", "plus", "plain").mark("new")
        new.on_click(lambda: ui.navigate.to("/?new=1"))

    def _other(self) -> str:
        """A model to compare the first one with."""
        first = self._conversation.settings.models[0]
        return next((name for name in self._names if name != first), first)

    def _known(self, name: str) -> list[str]:
        return self._names if name in self._names else [*self._names, name]

    def _choose(self, side: int, name: str) -> None:
        models = self._conversation.settings.models
        if side < len(models):
            models[side] = name

    def _toggle_compare(self) -> None:
        settings = self._conversation.settings
        if len(settings.models) > 1:
            settings.models = settings.models[:1]
        else:
            settings.models = [settings.models[0], str(self._second.value)]
        self._second.set_visibility(len(settings.models) > 1)

    def _make_welcome(self) -> ui.element:
        with ui.element("div").classes("welcome") as welcome:
            with ui.element("h2"):
                ui.label("Ask the model something")
            ui.label(
                "Everything stays on this server. Pick an adapter above, or two models to compare."
            ).classes("dim")
            with ui.element("div").classes("tries"):
                for text in TRIES:
                    button(text, kind="plain").on_click(lambda text=text: self._ask(text))
        return welcome

    def _make_composer(self) -> None:
        with ui.element("div").classes("composer-box"):
            self._input: ui.textarea = (
                ui.textarea(placeholder="Write a message")
                .props('autogrow borderless dense autofocus aria-label="Message"')
                .on(
                    "keydown.enter", lambda: self._ask(self._input.value), js_handler=_SEND_ON_ENTER
                )
                .mark("message")
            )
            self._send = icon_button("Send", "send", "main").mark("send")
            self._send.on_click(lambda: self._ask(self._input.value))
            self._stop = icon_button("Stop", "stop", "main").mark("stop")
            self._stop.on_click(self._conversation.stop)

    def _ask(self, text: str) -> None:
        def ask() -> None:
            self._settings.read()
            self._conversation.ask(text)
            self._input.value = ""

        self._guarded(ask)()

    def _guarded(self, act: Callable[[], object]) -> Callable[[], None]:
        """Do it, and show what was wrong beside the message, which is not lost."""

        def guarded() -> None:
            self._notice.clear()
            try:
                act()
            except AnabranchError as error:
                self._notice.wrong(error)

        return guarded


class SettingsPanel:
    """Sampling and shape of answers; empty means that the server chooses."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        with ui.element("section").classes("card settings") as self._panel:
            self._panel.props('aria-label="Settings"').style("margin-bottom: 20px")
            self._temperature = _number("Temperature", settings.temperature, 0, 2, 0.1)
            self._top_p = _number("Top p", settings.top_p, 0.01, 1, 0.05)
            self._max_tokens = _number("Most tokens", settings.max_tokens, 1, 2**20, 1)
            self._seed = _number("Seed", settings.seed, 0, 2**31 - 1, 1)
            self._shape = ui.select(SHAPES, value=settings.shape, label="Answers are")
            self._shape.props("outlined dense options-dense").mark("shape")
            self._shape.on_value_change(self._shaped)
            self._shape_text = ui.textarea("Schema, pattern or choices", value=settings.shape_text)
            self._shape_text.props("outlined dense autogrow").classes("wide code").mark(
                "shape-text"
            )
            self._system = ui.textarea("System prompt", value=settings.system)
            self._system.props("outlined dense autogrow").classes("wide").mark("system")
        self._panel.set_visibility(False)
        self._shape_text.set_visibility(settings.shape in EXAMPLES)

    def toggle(self) -> None:
        """Show or hide it."""
        self._panel.set_visibility(not self._panel.visible)

    def read(self) -> None:
        """Take over what is written there."""
        settings = self._settings
        settings.temperature = self._temperature.value
        settings.top_p = self._top_p.value
        settings.max_tokens = _whole(self._max_tokens.value)
        settings.seed = _whole(self._seed.value)
        settings.shape = self._shape.value
        settings.shape_text = self._shape_text.value or ""
        settings.system = self._system.value or ""

    def _shaped(self) -> None:
        shape: Shape = self._shape.value
        self._shape_text.set_visibility(shape in EXAMPLES)
        if shape in EXAMPLES and self._shape_text.value in ("", *EXAMPLES.values()):
            self._shape_text.value = EXAMPLES[shape]


def _number(label: str, value: float | None, low: float, high: float, step: float) -> ui.number:
    made = ui.number(label, value=value, min=low, max=high, step=step, placeholder="auto")
    return made.props("outlined dense stack-label").mark(label.lower())


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)
