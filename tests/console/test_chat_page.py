"""The chat page: what is said, what is shown, and that nothing of it is lost."""

from __future__ import annotations

import asyncio
import re

from nicegui import ui

from anabranch.console.components.reply import ReplyText
from tests.api.conftest import EchoModel

from .simulation import Visit, visit

LONG = "one two three four five six seven eight nine ten"


async def ask(at: Visit, text: str) -> None:
    at.user.find(marker="message").type(text)
    at.user.find(marker="send").click()
    await asyncio.sleep(0)


def replies(at: Visit) -> list[str]:
    with at.user:
        elements = ui.context.client.elements.values()
        return [each.text.strip() for each in elements if isinstance(each, ReplyText)]


def test_answers_with_counts_and_speed() -> None:
    async def story(at: Visit) -> None:
        await at.open()
        await at.sees("Ask the model something")
        await ask(at, LONG)
        await at.sees("10 in (5 cached) · 10 out")
        assert replies(at) == [LONG]
        assert any(re.search(r"tok/s · first token \d+ ms", text) for text in at.texts())
        assert "Ask the model something" not in at.texts()
        assert at.one(ui.textarea, "message").value == ""

    visit(story)


def test_two_models_side_by_side_get_their_own_history() -> None:
    first, second = EchoModel("first"), EchoModel("second")

    async def story(at: Visit) -> None:
        await at.open()
        at.user.find(marker="compare").click()
        await ask(at, "hello")
        await at.until(lambda: replies(at) == ["hello", "hello"])
        await at.until(lambda: not at.console.conversations.newest.running)
        await ask(at, "again")
        await at.until(lambda: replies(at)[2:] == ["again", "again"])
        assert at.texts().count("first") == at.texts().count("second") == 2
        for model in (first, second):
            roles = [message["role"] for message in model.messages]
            assert roles == ["user", "assistant", "user"]

    visit(story, first, second)


def test_settings_reach_the_model() -> None:
    model = EchoModel()

    async def story(at: Visit) -> None:
        await at.open()
        at.user.find(marker="settings").click()
        at.one(ui.number, "temperature").value = 0.3
        at.one(ui.number, "seed").value = 7.0
        at.one(ui.number, "most tokens").value = 3.0
        at.one(ui.textarea, "system").value = "Be brief."
        at.one(ui.select, "shape").value = "choice"
        at.one(ui.textarea, "shape-text").value = "yes\nno\n"
        await ask(at, LONG)
        await at.sees("ended at the most tokens")
        sampling = model.sampling
        assert sampling is not None and sampling.constraint is not None
        assert (sampling.temperature, sampling.seed, sampling.max_tokens) == (0.3, 7, 3)
        assert sampling.constraint.kind == "choice" and '"yes"' in sampling.constraint.text
        assert model.messages[0] == {"role": "system", "content": "Be brief."}
        assert replies(at) == ["one two three"]

    visit(story, model)


def test_a_request_that_cannot_be_made_says_why_and_keeps_the_message() -> None:
    async def story(at: Visit) -> None:
        await at.open()
        at.user.find(marker="settings").click()
        at.one(ui.select, "shape").value = "json_schema"
        at.one(ui.textarea, "shape-text").value = "{not json"
        await ask(at, "hello")
        await at.sees("schema: is not JSON")
        assert at.one(ui.textarea, "message").value == "hello" and replies(at) == []
        at.one(ui.select, "shape").value = "text"
        at.user.find(marker="message").clear()
        await ask(at, "   ")
        await at.sees("message: is empty; write something first")

    visit(story)


def test_stop_keeps_what_was_written_and_frees_the_model() -> None:
    model = EchoModel(delay=0.02)

    async def story(at: Visit) -> None:
        await at.open()
        await ask(at, "word " * 500)
        await at.until(lambda: any(len(text) > 10 for text in replies(at)))
        at.user.find(marker="stop").click()
        await at.sees("stopped")
        written = replies(at)[0]
        assert written.startswith("word") and len(written) < 2000
        assert model.generations[0].closed.is_set()
        assert at.console.service.active == 0

    visit(story, model)


def test_an_answer_can_be_stopped_before_it_begins() -> None:
    async def story(at: Visit) -> None:
        conversation = at.console.conversations.new(None)
        conversation.ask("hello")
        conversation.stop()
        await at.until(lambda: not conversation.running)
        assert conversation.turns[0].replies[0].outcome == "stopped"
        assert at.console.service.active == 0
        conversation.ask_again()
        await at.until(lambda: not conversation.running)
        assert [turn.replies[0].text for turn in conversation.turns] == ["hello "]

    visit(story)


def test_an_answer_that_breaks_keeps_its_text_and_can_be_asked_for_again() -> None:
    model = EchoModel(fail_after=3)

    async def story(at: Visit) -> None:
        await at.open()
        await ask(at, LONG)
        await at.sees("the echo broke")
        assert replies(at) == ["one two three"]
        model.fail_after = None
        at.user.find(marker="again").click()
        await at.until(lambda: replies(at) == [LONG])
        assert "the echo broke" not in at.texts()

    visit(story, model)


def test_internals_of_a_crash_are_not_shown() -> None:
    async def story(at: Visit) -> None:
        await at.open()
        await ask(at, LONG)
        await at.sees("its log has the reason")
        assert not any("secret internals" in text for text in at.texts())

    visit(story, EchoModel(fail_after=2, crash=True))


def test_a_page_that_is_loaded_anew_goes_on_reading() -> None:
    async def story(at: Visit) -> None:
        await at.open()
        await ask(at, LONG)
        await at.until(lambda: replies(at) and replies(at)[0].startswith("one"))
        conversation = at.console.conversations.newest
        await at.open(f"?chat={conversation.id}")
        assert replies(at)[0].startswith("one") and conversation.running
        await at.until(lambda: replies(at) == [LONG])
        await at.sees("10 out")

    visit(story, EchoModel(delay=0.05))


def test_two_tabs_see_one_conversation_and_leave_alone() -> None:
    async def story(at: Visit) -> None:
        await at.open()
        conversation = at.console.conversations.newest
        first = at.user.client
        await at.open(f"?chat={conversation.id}")
        assert len(conversation.watchers) == 2 and first is not None
        first.delete()
        assert len(conversation.watchers) == 1
        await ask(at, LONG)
        await at.until(lambda: replies(at) == [LONG])

    visit(story)


def test_a_lost_conversation_says_so_and_begins_anew() -> None:
    async def story(at: Visit) -> None:
        await at.open("?chat=of-an-earlier-server")
        await at.sees("no longer in the server's memory")
        assert replies(at) == []
        await ask(at, "hello")
        await at.until(lambda: replies(at) == ["hello"])

    visit(story)


def test_a_model_can_be_named_in_the_address() -> None:
    async def story(at: Visit) -> None:
        await at.open("?model=second")
        assert at.one(ui.select, "model-0").value == "second"
        await at.open("?model=unknown")
        assert at.one(ui.select, "model-0").value == "first"

    visit(story, EchoModel("first"), EchoModel("second"))


def test_no_answers_begin_while_the_server_drains() -> None:
    async def story(at: Visit) -> None:
        await at.open()
        at.console.service.draining = True
        await ask(at, "hello")
        await at.sees("shutting down")
        assert replies(at) == []

    visit(story)
