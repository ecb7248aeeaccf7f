"""``anabranch up`` with an engine that is replaced by the echo model of the API's tests."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from anabranch.cli import app
from anabranch.cli.serve import announce, curl
from anabranch.models.card import ModelCard
from anabranch.models.protocol import Model


class Silent(Model):
    name = "echo"
    card = ModelCard("echo", "Echo", 5, 10, "none", "Apache-2.0", "tests", "0" * 64, 0)


TESTS = Path(__file__).parents[1]
runner = CliRunner()

# Runs the real program; only the engine is another one.
PROGRAM = """
import sys, types
from api.conftest import EchoModel
seen = {}
class EngineOptions:
    def __init__(self, **options):
        self.options = options
class EngineModel(EchoModel):
    kv_memory = 2**30
    @classmethod
    def load(cls, name, *, served_name, options, dtype, progress):
        progress("loading", 0.5)
        print("options", sorted(options.options.items()), name, dtype, file=sys.stderr)
        return cls(served_name or name, delay=0.02)
fake = types.ModuleType("anabranch.serving")
fake.EngineModel, fake.EngineOptions = EngineModel, EngineOptions
sys.modules["anabranch.serving"] = fake
sys.modules.setdefault("torch", types.ModuleType("torch"))
import anabranch.registry
anabranch.registry.get = lambda kind, name: None
from anabranch.cli import main
main()
"""


def test_up_serves_announces_and_drains(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# team\nsecret\n")
    environment = {**os.environ, "ANABRANCH_KV_MEMORY": "2MiB", "ANABRANCH_PORT": "0"}
    environment["ANABRANCH_STATE"] = str(tmp_path / "state")
    # The console has tests of its own; its pages import what is replaced here.
    arguments = ["up", "--model", "m", "--name", "echo", "--no-console"]
    arguments += ["--api-key-file", str(keys)]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments, "--max-queue", "7", "--no-prefix-reuse"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=TESTS,
        env=environment,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("listening on http://127.0.0.1:"), process.communicate()
        url = line.split()[-1]
        shown = "".join(process.stdout.readline() for _ in range(6))
        assert "model    echo (0 parameters, none, context 1000, Apache-2.0)" in shown
        assert "1.0 GiB for keys and values" in shown
        assert f"curl {url}/v1/chat/completions" in shown
        body = {"model": "echo", "prompt": "a b c", "stream": True}
        headers = {"authorization": "Bearer secret"}
        assert httpx.post(f"{url}/v1/completions", json=body).status_code == 401
        with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=headers) as response:
            process.send_signal(signal.SIGTERM)
            assert response.read().endswith(b"data: [DONE]\n\n")
        _, stderr = process.communicate(timeout=10)
        assert process.returncode == 0
        assert "('kv_memory', 2097152)" in stderr
        assert "('max_queue', 7)" in stderr
        assert "('prefix_reuse', False)" in stderr
        assert "('token_budget', None)" in stderr
        assert "Traceback" not in stderr
        assert (tmp_path / "state" / "jobs.sqlite").exists()
    finally:
        process.kill()


def test_port_in_use_is_found_before_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "anabranch.serving", types.ModuleType("untouched"))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = runner.invoke(app, ["up", "--port", str(port)])
    assert done.exit_code == 2
    assert f"port {port} on 127.0.0.1 is in use" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--kv-memory", "2 apples"], "not a size"),
        (["--port", "70000"], "--port"),
        (["--log-level", "loud"], "debug"),
        (["--token-budget", "0"], "--token-budget"),
        (["--api-key-file", "/nowhere"], "cannot read"),
    ],
)
def test_bad_options(arguments: list[str], words: str) -> None:
    done = runner.invoke(app, ["up", *arguments])
    assert done.exit_code == 2
    assert words in done.stderr


def test_key_file(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    for text, words in (("# none\n\n", "holds no API key"), ("a b\n", "line 1")):
        keys.write_text(text)
        done = runner.invoke(app, ["up", "--api-key-file", str(keys)])
        assert words in done.stderr


def test_open_address_is_warned_about(capsys: pytest.CaptureFixture[str]) -> None:
    served: list[Model] = [Silent()]
    announce(served, "http://0.0.0.0:80", needs_key=False)
    shown = capsys.readouterr()
    assert "curl http://127.0.0.1:80/v1" in shown.out
    assert "--api-key-file" in shown.err
    for url, key in (("http://0.0.0.0:80", True), ("http://127.0.0.1:80", False)):
        announce(served, url, needs_key=key)
        assert capsys.readouterr().err == ""


def test_curl_can_be_pasted() -> None:
    command = shlex.split(curl("it's", "http://127.0.0.1:8000", needs_key=True))
    assert command[:2] == ["curl", "http://127.0.0.1:8000/v1/chat/completions"]
    body: dict[str, Any] = json.loads(command[-1])
    assert body["model"] == "it's"
    assert "authorization: Bearer $KEY" in command
