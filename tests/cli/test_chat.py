from __future__ import annotations

import builtins
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from typer.testing import CliRunner

from anabranch.cli import app
from anabranch.cli.chat import Client, converse, show

runner = CliRunner()


class Handler(BaseHTTPRequestHandler):
    """Answers "you said ..." word by word, and refuses what contains "bad"."""

    bodies: list[dict[str, Any]] = []

    def do_GET(self) -> None:
        self.reply(200, json.dumps({"data": [{"id": "parrot"}]}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.bodies.append({**body, "key": self.headers["authorization"]})
        text = body["messages"][-1]["content"]
        if "bad" in text:
            self.reply(400, json.dumps({"error": {"message": "messages: is bad"}}))
            return
        pieces = [{"choices": [{"delta": {"content": word}}]} for word in ("you said ", text)]
        if "break" in text:
            pieces.append({"error": {"message": "it broke"}})
        self.reply(200, "".join(f"data: {json.dumps(p)}\n\n" for p in pieces) + "data: [DONE]\n\n")

    def reply(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def no_bodies() -> None:
    Handler.bodies.clear()


def test_one_shot(url: str) -> None:
    options = ["--url", url, "--system", "short", "--temperature", "0", "--max-tokens", "5"]
    done = runner.invoke(app, ["chat", "hello", *options, "--api-key", "k"])
    assert done.stdout == "you said hello\n"
    assert Handler.bodies == [
        {
            "model": "parrot",
            "messages": [
                {"role": "system", "content": "short"},
                {"role": "user", "content": "hello"},
            ],
            "stream": True,
            "temperature": 0.0,
            "max_tokens": 5,
            "key": "Bearer k",
        }
    ]


def test_piped_input_is_the_prompt(url: str) -> None:
    done = runner.invoke(app, ["chat", "--url", url, "--model", "m"], input="from a pipe\n")
    assert done.stdout == "you said from a pipe\n"
    assert Handler.bodies[0]["model"] == "m"
    assert runner.invoke(app, ["chat", "--url", url], input="").exit_code == 1


def test_conversation(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = iter(["one", "", KeyboardInterrupt(), "bad", "break", "two", EOFError()])

    def read(_: str) -> str:
        turn = next(turns)
        if isinstance(turn, BaseException):
            raise turn
        return turn

    monkeypatch.setattr(builtins, "input", read)
    client = Client(url, None, {})
    messages: list[dict[str, str]] = []
    converse(client, messages)
    # Refused and broken turns leave no trace.
    assert [m["content"] for m in messages] == ["one", "you said one", "two", "you said two"]


def test_ctrl_c_stops_the_answer_only(capsys: pytest.CaptureFixture[str]) -> None:
    closed = []

    def pieces() -> Iterator[str]:
        try:
            yield "half"
            raise KeyboardInterrupt
        finally:
            closed.append(True)

    assert show(pieces()) == "half"
    assert closed
    assert capsys.readouterr().out == "half\n"


def test_no_server() -> None:
    done = runner.invoke(app, ["chat", "hi", "--url", "http://127.0.0.1:9/v1"])
    assert done.exit_code == 1
    assert "no server listens at http://127.0.0.1:9/v1" in done.stderr
    assert "anabranch up" in done.stderr


def test_errors_of_the_server_are_shown(url: str) -> None:
    refused = runner.invoke(app, ["chat", "bad", "--url", url])
    assert refused.stderr == "error: messages: is bad\n"
    broken = runner.invoke(app, ["chat", "break", "--url", url])
    assert broken.exit_code == 1
    assert "it broke" in broken.stderr
    assert runner.invoke(app, ["chat", "x", "--url", "nonsense"]).exit_code == 1
