"""Adapters over HTTP by the official client: loaded, replaced, used and deleted in service."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from peft import LoraConfig, PeftModel, get_peft_model

from anabranch.serving import EngineModel
from tests import tiny

from .conftest import CARD, EchoModel, LiveServer, make
from .test_refusals import check

PROMPT = list(range(30, 60))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("tone", "style")):
        adapted = get_peft_model(tiny.llama(), LoraConfig(r=2, target_modules="all-linear"))
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data.uniform_(-0.5, 0.5 + seed)
        adapted.save_pretrained(root / name)
    (root / "broken").mkdir()
    return root


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[LiveServer]:
    tokenizer = tiny.byte_tokenizer()
    model = EngineModel("base", CARD, tokenizer, tiny.engine(200, tokenizer=tokenizer))
    model.load_adapter("first", folder / "tone")
    with LiveServer(model, EchoModel(), adapters=folder) as live:
        yield live


@pytest.fixture
def client(server: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def answer(client: openai.OpenAI, model: str) -> list[int]:
    completion = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=8, temperature=0, extra_body={"ignore_eos": True}
    )
    assert completion.model == model
    return list(completion.choices[0].text.encode("utf-8", "replace"))


def expected(folder: Path | None) -> list[int]:
    model = tiny.llama()
    if folder is not None:
        model = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    tokens = tiny.reference(model, PROMPT, 8)
    return list(tiny.byte_tokenizer().decode(tokens).encode("utf-8", "replace"))


def test_the_life_of_an_adapter(client: openai.OpenAI, folder: Path) -> None:
    names = [model.id for model in client.models.list()]
    assert names == ["base", "base:first", "echo"]
    assert answer(client, "base") == expected(None)
    assert answer(client, "base:first") == expected(folder / "tone")

    loaded = client.post(
        "/adapters", body={"model": "base", "adapter": "style"}, cast_to=openai.types.Model
    )
    assert loaded.id == "base:style"
    assert answer(client, "base:style") == expected(folder / "style")

    # A new version under the old name.
    client.post(
        "/adapters",
        body={"model": "base", "adapter": "first", "source": "style"},
        cast_to=openai.types.Model,
    )
    assert answer(client, "base:first") == expected(folder / "style")
    assert client.models.retrieve("base:first").model_dump()["card"]["provenance"].endswith("2")

    assert client.models.delete("base:style").deleted
    with pytest.raises(openai.NotFoundError, match="no adapter 'style'"):
        answer(client, "base:style")
    assert answer(client, "base") == expected(None)


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        ({"model": "base", "adapter": "broken"}, 400, "is no adapter"),
        ({"model": "base", "adapter": "absent"}, 400, "is no adapter"),
        ({"model": "base", "adapter": "x", "source": "../tone"}, 400, "no name of a folder"),
        ({"model": "base", "adapter": "x", "source": ".."}, 400, "no name of a folder"),
        ({"model": "base", "adapter": "a:b", "source": "tone"}, 400, "cannot name an adapter"),
        ({"model": "nothing", "adapter": "tone"}, 404, "no base model"),
        ({"model": "echo", "adapter": "tone"}, 400, "cannot take adapters"),
        ({"model": "base", "adapter": "tone", "rank": 4}, 400, "rank"),
    ],
)
def test_refusals(client: openai.OpenAI, body: dict[str, object], status: int, word: str) -> None:
    with pytest.raises(openai.APIStatusError, match=word) as caught:
        client.post("/adapters", body=body, cast_to=openai.types.Model)
    assert caught.value.status_code == status
    assert "base:first" in [model.id for model in client.models.list()]


def test_a_base_model_cannot_be_deleted() -> None:
    api = make()
    check(api.request("DELETE", "/v1/models/echo"), 400, "model", "only adapters")
    check(api.request("DELETE", "/v1/models/echo:x"), 404)
