"""Versions that a running server serves as soon as they are made."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
import torch
from typer.testing import CliRunner

from anabranch.cli import app
from anabranch.errors import ConfigurationError
from anabranch.federated.job import load_job
from anabranch.federated.running import federate
from anabranch.serving import EngineModel, EngineOptions
from tests.api.conftest import LiveServer
from tests.federated.network.test_cli import JOB, RECIPE
from tests.training.tiny_base import write_base

runner = CliRunner()


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def job(base: Path, tmp_path: Path) -> Path:
    (tmp_path / "tiny.yaml").write_text(RECIPE.format(base=base))
    (tmp_path / "job.yaml").write_text(JOB)
    return tmp_path / "job.yaml"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def server(base: Path, adapters: Path):
    options = EngineOptions(max_model_len=256, kv_memory=1 << 22, runner="transformers")
    with LiveServer(
        EngineModel.load(str(base), served_name="tiny", options=options), adapters=adapters
    ) as live:
        yield live


def loaded(path: Path, url: str, adapters: Path, *overrides: str):
    return load_job(path, [f"publish={{url: '{url}', folder: {adapters}}}", *overrides])


def served(server) -> list[str]:
    listed = httpx.get(f"{server.url}/v1/models", trust_env=False).json()
    return [item["id"] for item in listed["data"]]


def answer(server, model: str) -> list[float]:
    body = {"model": model, "prompt": "Say hello", "max_tokens": 4, "temperature": 0, "logprobs": 1}
    found = httpx.post(f"{server.url}/v1/completions", json=body, trust_env=False, timeout=30)
    return found.json()["choices"][0]["logprobs"]["token_logprobs"]


def test_every_version_is_served(job: Path, tmp_path: Path, server, adapters: Path) -> None:
    seen = []

    def observe(coordinator):
        seen.append((coordinator.version, served(server), answer(server, "tiny:silos")))

    federate(loaded(job, server.url, adapters), tmp_path / "run", observe=observe)
    assert [(version, names) for version, names, _ in seen] == [
        (1, ["tiny", "tiny:silos"]),
        (2, ["tiny", "tiny:silos"]),
    ]
    first, second = (numbers for *_, numbers in seen)
    assert first != second != answer(server, "tiny")
    # What is served is the run's result, and the versions before are gone.
    assert [folder.name for folder in adapters.iterdir()] == ["silos.version-2"]
    weights = (adapters / "silos.version-2" / "adapter_model.safetensors").read_bytes()
    result = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    assert result.read_bytes() == weights
    assert json.loads((tmp_path / "run" / "published.json").read_text()) == {
        "version": 2,
        "served": "tiny:silos",
    }


def test_by_the_command_line_with_a_server_that_goes_away(
    job: Path, tmp_path: Path, base: Path, adapters: Path, monkeypatch
) -> None:
    """The run goes on; what was not served is an incident."""
    monkeypatch.setenv("ANABRANCH_CACHE", str(tmp_path / "cache"))
    options = EngineOptions(max_model_len=256, kv_memory=1 << 22, runner="transformers")
    model = EngineModel.load(str(base), served_name="tiny", options=options)
    with LiveServer(model, adapters=adapters) as live:
        made = loaded(job, live.url, adapters, "publish.adapter=other")

        def stop(coordinator):
            if coordinator.version == 1:
                assert served(live) == ["tiny", "tiny:other"]
                live.signal()
                live.signal()
                live.join()

        outcome = federate(made, tmp_path / "run", observe=stop)
    [incident] = outcome.result.incidents
    assert incident.what == "not published" and "version 2 is not served" in incident.message
    assert outcome.result.version == 2
    output = str(tmp_path / "nothing")
    refused = runner.invoke(app, ["federate", str(job), "--publish", live.url, "-o", output])
    assert refused.exit_code == 2 and "does not answer" in refused.stderr
    assert "start it with: anabranch up" in refused.stderr


def test_another_base_is_refused_before_anything_is_trained(
    job: Path, tmp_path: Path, server, adapters: Path
) -> None:
    other = write_base(tmp_path / "other", seed=9)
    (tmp_path / "tiny.yaml").write_text(RECIPE.format(base=other))
    made = loaded(job, server.url, adapters)
    with pytest.raises(ConfigurationError, match="serves tiny; none of them is this job's base"):
        federate(made, tmp_path / "run")
    assert not (tmp_path / "run" / "run").exists()


def test_keys_that_cannot_be(job: Path, tmp_path: Path, adapters: Path) -> None:
    for override, says in (
        ("publish={url: nowhere}", "pattern"),
        ("publish={url: 'http://h', adapter: 'a/b'}", "pattern"),
        ("publish={adapter: x}", "url"),
    ):
        with pytest.raises(ConfigurationError, match=says):
            load_job(job, [override])
    whole = RECIPE.format(base="x").replace("{method: lora, r: 2}", "{method: full}")
    (tmp_path / "tiny.yaml").write_text(whole)
    with pytest.raises(ConfigurationError, match="publish serves adapters"):
        loaded(job, "http://127.0.0.1:1", adapters)
