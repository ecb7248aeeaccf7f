"""Disconnects, draining and ports, over real sockets."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from anabranch.api import bind, create_app, serve
from anabranch.api.server import PortInUse
from anabranch.errors import ConfigurationError, ModelError

from .conftest import EchoModel, LiveServer

LONG = {"model": "echo", "messages": [{"role": "user", "content": "w " * 400}]}


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.005)
    return False


def connect(server: LiveServer, path: str, body: dict[str, object]) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=10)
    headers = {"content-type": "application/json"}
    connection.request("POST", path, json.dumps(body), headers)
    return connection


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_disconnect_aborts_within_a_moment(stream: bool, path: str) -> None:
    # One token is due in ten seconds: what is noticed is the disconnect, not a failed write.
    model = EchoModel(delay=10)
    body = {**LONG, "stream": stream}
    if path == "completions":
        body = {"model": "echo", "prompt": ["w " * 400, "v"], "stream": stream}
    with LiveServer(model) as server:
        connection = connect(server, f"/v1/{path}", body)
        expected = 2 if path == "completions" else 1
        assert within(2, lambda: model.running == expected)
        connection.close()
        assert within(1, lambda: all(g.closed.is_set() for g in model.generations))
        assert within(1, lambda: model.running == 0)
        metrics = httpx.get(f"{server.url}/metrics").text
        assert 'anabranch_aborted_total{model="echo"} 1.0' in metrics


def test_disconnect_cancels_embeddings() -> None:
    model = EchoModel(delay=10)
    with LiveServer(model) as server:
        connection = connect(server, "/v1/embeddings", {"model": "echo", "input": "a"})
        assert within(2, lambda: server.server.service.active == 1)
        connection.close()
        assert within(1, lambda: server.server.service.active == 0)
        assert (
            'anabranch_aborted_total{model="echo"} 1.0' in httpx.get(f"{server.url}/metrics").text
        )


def test_disconnect_between_tokens() -> None:
    model = EchoModel(delay=0.02)
    with LiveServer(model) as server:
        connection = connect(server, "/v1/chat/completions", {**LONG, "stream": True})
        connection.getresponse().read(300)
        connection.close()
        assert within(1, lambda: model.generations[0].closed.is_set())


def test_drain_lets_streams_finish_and_refuses_new_requests() -> None:
    model = EchoModel(delay=0.05)
    with LiveServer(model) as server:
        body = {"model": "echo", "messages": [{"role": "user", "content": "w " * 12}]}
        connection = connect(server, "/v1/chat/completions", {**body, "stream": True})
        response = connection.getresponse()
        server.signal()
        refused = httpx.post(f"{server.url}/v1/chat/completions", json=body)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "draining"
        assert refused.headers["retry-after"]
        assert httpx.get(f"{server.url}/health").status_code == 503
        text = response.read().decode()
        assert text.count("w ") == 12
        assert text.endswith("data: [DONE]\n\n")
        server.join()
        assert server.server.cut_off == 0
        assert model.was_closed


def test_second_signal_stops_at_once(caplog: pytest.LogCaptureFixture) -> None:
    model = EchoModel(delay=10)
    with LiveServer(model, drain_timeout=60) as server:
        connection = connect(server, "/v1/chat/completions", {**LONG, "stream": True})
        assert within(2, lambda: model.running == 1)
        server.signal()
        server.signal()
        text = connection.getresponse().read().decode()
        assert '"code": "draining"' in text.splitlines()[-2]
        server.join()
        assert server.server.cut_off == 1
        assert model.generations[0].closed.is_set()
        connection.close()
        assert model.was_closed
        assert "Traceback" not in caplog.text


def test_drain_timeout_cuts_off() -> None:
    model = EchoModel(delay=10)
    with LiveServer(model, drain_timeout=0.2) as server:
        connection = connect(server, "/v1/chat/completions", LONG)
        assert within(2, lambda: model.running == 1)
        server.signal()
        response = connection.getresponse()
        assert response.status == 503
        assert json.loads(response.read())["error"]["code"] == "draining"
        server.join()
        assert server.server.cut_off == 1
        assert model.generations[0].closed.is_set()
        connection.close()


SCRIPT = """
import sys
from api.conftest import EchoModel
from anabranch.api import bind, create_app, serve
app = create_app([EchoModel(delay=0.05)])
sys.exit(serve(app, bind("127.0.0.1", 0), on_listening=lambda url: print(url, flush=True)))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_process_exits_with_0_after_a_drain(number: int) -> None:
    tests = Path(__file__).parents[1]
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, cwd=tests)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().decode().strip()
        body = {"model": "echo", "prompt": "w " * 10, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body) as response:
            process.send_signal(number)
            assert response.read().endswith(b"data: [DONE]\n\n")
        assert process.wait(5) == 0
    finally:
        process.kill()
        process.stdout.close()


def test_port_in_use_is_said_before_anything_is_loaded() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(PortInUse, match=f"port {port} on 127.0.0.1 is in use.*--port"):
            bind("127.0.0.1", port)


def test_port_taken_while_the_model_was_loading() -> None:
    listener = bind("127.0.0.1", 0)
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(listener.getsockname())
        other.listen()
        with pytest.raises(PortInUse):
            serve(create_app([EchoModel()]), listener)


def test_bad_addresses() -> None:
    with pytest.raises(ConfigurationError, match="cannot listen on 192"):
        bind("192.0.2.1", 0)
    with pytest.raises(ConfigurationError, match="cannot resolve"):
        bind("no host", 0)


def test_nobody_answers_before_the_model_has_started() -> None:
    listener = bind("127.0.0.1", 0)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{listener.getsockname()[1]}/health")
    listener.close()


def test_a_model_that_cannot_start_is_reported_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    first, second = EchoModel("a"), EchoModel("b", broken_start=ModelError("no memory"))
    errors: list[BaseException] = []

    def run() -> None:
        try:
            serve(create_app([first, second]), bind("127.0.0.1", 0))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(5)
    assert isinstance(errors[0], ModelError)
    assert first.was_closed
    assert not caplog.records


@pytest.mark.skipif(not socket.has_ipv6, reason="needs IPv6")
def test_ipv6_address_is_shown_in_brackets() -> None:
    try:
        listener = bind("::1", 0)
    except ConfigurationError:
        pytest.skip("no IPv6 loopback")
    urls: list[str] = []
    app = create_app([EchoModel()])

    def on_listening(url: str) -> None:
        urls.append(url)
        app.state.service.draining = True

    assert serve(app, listener, on_listening=on_listening) == 0
    assert urls[0].startswith("http://[::1]:")


def test_names_must_differ() -> None:
    with pytest.raises(ConfigurationError, match="two models"):
        create_app([EchoModel(), EchoModel()])
    with pytest.raises(ConfigurationError, match="at least one"):
        create_app([])
