"""What was said in a conversation, and what is being said."""

from __future__ import annotations

from collections.abc import Callable

from nicegui import ui

from anabranch.console.components.frame import button
from anabranch.console.components.reply import ReplyText
from anabranch.console.conversation import Conversation, Reply, Turn
from anabranch.console.text import seconds_text

_COPY = """() => {{
  navigator.clipboard?.writeText(getElement({id}).shown);
}}"""


class Transcript:
    """All turns. Only what changed is sent: a turn that is over costs nothing."""

    def __init__(self, conversation: Conversation, ask_again: Callable[[], None]) -> None:
        self._conversation = conversation
        self._ask_again = ask_again
        self._turns: list[TurnView] = []
        self._log = ui.element("div").classes("log").props('role=log aria-label="Conversation"')

    def show(self) -> None:
        """Add what is new and bring what is unfinished up to date."""
        turns = self._conversation.turns
        while self._turns and (
            len(self._turns) > len(turns) or self._turns[-1].turn is not turns[len(self._turns) - 1]
        ):
            self._turns.pop().element.delete()
        for turn in turns[len(self._turns) :]:
            if self._turns:
                self._turns[-1].is_last(False)
            with self._log:
                self._turns.append(TurnView(turn, self._ask_again))
        if self._turns:
            self._turns[-1].show()


class TurnView:
    """A question and its answers."""

    def __init__(self, turn: Turn, ask_again: Callable[[], None]) -> None:
        self.turn = turn
        with ui.element("div").classes("turn") as self.element:
            ui.label(turn.prompt).classes("prompt")
            two = "two" if len(turn.replies) > 1 else ""
            with ui.element("div").classes(f"replies {two}"):
                self._replies = [ReplyView(reply, ask_again) for reply in turn.replies]

    def show(self) -> None:
        """Bring it up to date."""
        for reply in self._replies:
            reply.show()

    def is_last(self, last: bool) -> None:
        """Only the last answer can be asked for again."""
        for reply in self._replies:
            reply.again.set_visibility(last)


class ReplyView:
    """One model's answer: its text, what it cost, and what can be done with it."""

    def __init__(self, reply: Reply, ask_again: Callable[[], None]) -> None:
        self._reply = reply
        running = reply.outcome == "running"
        with ui.element("article").classes("reply"):
            ui.label(reply.model).classes("reply-head")
            self._text = ReplyText(reply.text, running)
            self._error = ui.label().classes("notice bad").props("role=alert")
            with ui.element("div").classes("reply-foot"):
                self._cost = ui.label().classes("number")
                self._copy = button("Copy", "copy").classes("small")
                self._copy.on("click", js_handler=_COPY.format(id=self._text.id))
                self.again = button("Try again", "again").classes("small").mark("again")
                self.again.on_click(ask_again)
        self._shown = ""
        self._over = False
        self.show()

    def show(self) -> None:
        """Bring it up to date."""
        if self._over:
            return
        reply = self._reply
        self._over = reply.outcome != "running"
        self._text.show(reply.text, not self._over)
        self._cost.text = cost_text(reply)
        self._copy.set_visibility(self._over and bool(reply.text))
        self.again.set_visibility(self._over)
        self._error.text = reply.error or ""
        self._error.set_visibility(reply.error is not None)


def cost_text(reply: Reply) -> str:
    """Tokens in and out, speed, and why it ended, as one line."""
    if reply.first_token_after is None and reply.outcome == "running":
        return "thinking about the first token …"
    parts = []
    if reply.prompt_tokens:
        cached = f" ({reply.cached_tokens:,} cached)" if reply.cached_tokens else ""
        parts.append(f"{reply.prompt_tokens:,} in{cached}")
    if reply.output_tokens:
        parts.append(f"{reply.output_tokens:,} out")
    if (speed := reply.tokens_per_second) is not None:
        parts.append(f"{speed:.1f} tok/s")
    if reply.first_token_after is not None:
        parts.append(f"first token {seconds_text(reply.first_token_after)}")
    if reply.outcome in ("stopped", "failed"):
        parts.append(reply.outcome)
    elif reply.cut_short:
        parts.append("ended at the most tokens")
    return " · ".join(parts)
