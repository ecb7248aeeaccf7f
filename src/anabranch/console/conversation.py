"""Conversations of the chat page. They belong to the server, not to a tab.

A tab that is reloaded, or a second one, finds what was said and goes on reading an answer that is
still being written; whoever leaves loses nothing. They are kept in memory until the server stops.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from anabranch.api.answer import Answer
from anabranch.api.body import validate
from anabranch.api.routes.chat import admit_chat
from anabranch.api.schemas import ChatCompletionRequest
from anabranch.api.service import Service
from anabranch.console.live import Watchers
from anabranch.errors import AnabranchError, Draining, InvalidRequest

logger = logging.getLogger("anabranch.console")

MOST_CONVERSATIONS = 500
SHOW_SECONDS = 0.1
"""Between two looks at an answer that is being written."""

Shape = Literal["text", "json_object", "json_schema", "regex", "choice"]
Outcome = Literal["running", "finished", "stopped", "failed"]

BROKEN = "the server failed while answering; its log has the reason"


@dataclass
class Settings:
    """How answers are made. ``None`` leaves the choice to the server."""

    models: list[str]
    """One, or two that answer side by side."""
    system: str = ""
    temperature: float | None = 0.7
    top_p: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    shape: Shape = "text"
    shape_text: str = ""
    """A JSON schema, a pattern, or one choice a line."""

    def body(self, model: str, messages: list[dict[str, str]]) -> dict[str, Any]:
        """The request that ``POST /v1/chat/completions`` would take."""
        optional = {
            name: value
            for name in ("temperature", "top_p", "max_tokens", "seed")
            if (value := getattr(self, name)) is not None
        }
        if self.shape != "text":
            optional["constraint"] = self._constraint()
        return {"model": model, "messages": messages, **optional}

    def _constraint(self) -> dict[str, Any]:
        match self.shape:
            case "json_schema":
                try:
                    return {"type": "json_schema", "schema": json.loads(self.shape_text)}
                except ValueError as error:
                    raise InvalidRequest("schema", f"is not JSON: {error}") from None
            case "regex":
                return {"type": "regex", "pattern": self.shape_text}
            case "choice":
                lines = [line.strip() for line in self.shape_text.splitlines()]
                return {"type": "choice", "choices": [line for line in lines if line]}
            case _:
                return {"type": "json_object"}


@dataclass
class Reply:
    """One model's answer as far as it has come. Times are seconds."""

    model: str
    text: str = ""
    outcome: Outcome = "running"
    error: str | None = None
    cut_short: bool = False
    """Whether the limit of tokens ended it."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    first_token_after: float | None = None
    decoding_for: float = 0.0
    """From the first token to the newest."""

    @property
    def tokens_per_second(self) -> float | None:
        """Of decoding, once there are two tokens."""
        if self.output_tokens < 2 or self.decoding_for <= 0:
            return None
        return (self.output_tokens - 1) / self.decoding_for


@dataclass
class Turn:
    """A question and what each model said to it."""

    prompt: str
    replies: list[Reply] = field(default_factory=list)


class Conversation:
    """Turns in order, and the answers that are being written.

    ``watchers`` are told at most every :data:`SHOW_SECONDS`, and when something begins or ends.
    """

    def __init__(self, service: Service, owner: str | None, settings: Settings) -> None:
        self.id = secrets.token_urlsafe(12)
        self.owner = owner
        self.settings = settings
        self.turns: list[Turn] = []
        self.watchers: Watchers[Conversation] = Watchers()
        self._service = service
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._told: asyncio.TimerHandle | None = None

    @property
    def running(self) -> bool:
        """Whether an answer is being written."""
        return bool(self._tasks)

    def ask(self, prompt: str) -> Turn:
        """Begin a turn. Raises :class:`AnabranchError` for a request that cannot be made."""
        if self.running:
            raise InvalidRequest("message", "the last answer is still being written; stop it first")
        if not prompt.strip():
            raise InvalidRequest("message", "is empty; write something first")
        if self._service.draining:
            raise Draining("the server is shutting down and takes no new requests")
        asked = self.settings
        requests = [
            validate(asked.body(model, self._messages(side, prompt)), ChatCompletionRequest)
            for side, model in enumerate(asked.models)
        ]
        turn = Turn(prompt, [Reply(model) for model in asked.models])
        self.turns.append(turn)
        for side, (reply, request) in enumerate(zip(turn.replies, requests, strict=True)):
            task = self._tasks[side] = asyncio.create_task(self._answer(reply, request))
            task.add_done_callback(partial(self._ended, side, reply))
        self._tell()
        return turn

    def ask_again(self) -> Turn:
        """Put the last question once more, in place of its answers."""
        if self.running or not self.turns:
            raise InvalidRequest("message", "there is no finished answer to try again")
        last = self.turns.pop()
        try:
            return self.ask(last.prompt)
        except AnabranchError:
            self.turns.append(last)
            raise

    def stop(self) -> None:
        """End what is being written; what has been is kept."""
        for task in self._tasks.values():
            task.cancel()

    def _messages(self, side: int, prompt: str) -> list[dict[str, str]]:
        """The conversation as one side has it; where it was not asked, the other's answers."""
        messages = []
        if self.settings.system.strip():
            messages.append({"role": "system", "content": self.settings.system})
        for turn in self.turns:
            messages.append({"role": "user", "content": turn.prompt})
            said = turn.replies[min(side, len(turn.replies) - 1)].text
            if said:
                messages.append({"role": "assistant", "content": said})
        return [*messages, {"role": "user", "content": prompt}]

    def _ended(self, side: int, reply: Reply, task: asyncio.Task[None]) -> None:
        """Also of a task that was cancelled before it began."""
        if reply.outcome == "running":
            reply.outcome = "stopped"
        self._tasks.pop(side, None)
        self._tell()

    async def _answer(self, reply: Reply, request: ChatCompletionRequest) -> None:
        self._service.active += 1  # a server that drains waits for it as for any other request
        answer: Answer | None = None
        try:
            began = time.perf_counter()
            _, _, answer = await admit_chat(self._service, request, began)
            await self._read(reply, answer, began)
            reply.outcome = "finished"
        except asyncio.CancelledError:
            reply.outcome = "stopped"
            if answer is not None:
                answer.timer.aborted()
        except AnabranchError as error:
            reply.outcome, reply.error = "failed", str(error)
        except Exception:
            logger.exception("an answer on the chat page failed")
            reply.outcome, reply.error = "failed", BROKEN
        finally:
            if answer is not None:
                await answer.aclose()
            self._service.active -= 1

    async def _read(self, reply: Reply, answer: Answer, began: float) -> None:
        async for _, delta in answer:
            now = time.perf_counter() - began
            reply.text += delta.text
            reply.prompt_tokens = answer.prompt_tokens
            reply.output_tokens = answer.timer.output_tokens
            if delta.token_ids:
                if reply.first_token_after is None:
                    reply.first_token_after = now
                reply.decoding_for = now - reply.first_token_after
            if delta.finish_reason is not None:
                reply.cut_short = delta.finish_reason == "length"
                reply.cached_tokens = answer.generations[0].cached_tokens
            self._tell_soon()

    def _tell_soon(self) -> None:
        if self._told is None:
            loop = asyncio.get_running_loop()
            self._told = loop.call_later(SHOW_SECONDS, self._tell)

    def _tell(self) -> None:
        if self._told is not None:
            self._told.cancel()
            self._told = None
        self.watchers.tell(self)


class Conversations:
    """All of them by id; the oldest that nobody reads makes room for a new one."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._conversations: OrderedDict[str, Conversation] = OrderedDict()

    def new(self, owner: str | None, model: str | None = None) -> Conversation:
        """An empty one with ``model``, or with the first that is served."""
        names = [each.name for each in self._service.listed()]
        chosen = model if model in names else names[0]
        made = Conversation(self._service, owner, Settings([chosen]))
        self._conversations[made.id] = made
        self._make_room()
        return made

    @property
    def newest(self) -> Conversation:
        """The one that was made last; there has to be one."""
        return next(reversed(self._conversations.values()))

    def get(self, id_: str, owner: str | None) -> Conversation | None:
        """The conversation if it is this owner's."""
        found = self._conversations.get(id_)
        return found if found is not None and found.owner == owner else None

    async def close(self) -> None:
        """Stop all answers."""
        tasks = [task for each in self._conversations.values() for task in each._tasks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _make_room(self) -> None:
        excess = len(self._conversations) - MOST_CONVERSATIONS
        if excess <= 0:
            return
        newest = self.newest
        unused = [
            each
            for each in self._conversations.values()
            if each is not newest and not each.running and not len(each.watchers)
        ]
        unused.sort(key=lambda each: bool(each.turns))  # empty ones first, each kind by age
        for each in unused[:excess]:
            del self._conversations[each.id]
