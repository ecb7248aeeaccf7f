"""Hugging Face folders: whole ones load, damaged ones say what is damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anabranch import models
from anabranch.errors import (
    ConfigurationError,
    ModelCorrupt,
    ModelError,
    ModelNotFound,
    ModelUnsupported,
)
from anabranch.models.checks import safetensors_header
from anabranch.models.source import resolve

from .conftest import write_bert, write_llama


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_folder_loads_as_it_was_saved(tiny_folder: Path) -> None:
    from transformers import LlamaForCausalLM

    model = models.load(str(tiny_folder))
    assert model.name == "tiny-llama"
    assert model.path == tiny_folder
    original = LlamaForCausalLM.from_pretrained(tiny_folder)
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(model.network(ids).logits, original(ids).logits)
    assert model.tokenizer("abc")["input_ids"] == [3, 4, 5]


def test_card_of_a_folder(tiny_folder: Path) -> None:
    card = models.card(str(tiny_folder))
    network = models.load(str(tiny_folder)).network
    assert card.parameters == sum(p.numel() for p in network.parameters())
    assert (card.context_length, card.dtype, card.licence) == (64, "float32", "cc0-1.0")
    assert card.provenance == f"directory {tiny_folder}"
    assert card.size_bytes == (tiny_folder / "model.safetensors").stat().st_size


def test_the_fingerprint_follows_the_weights_and_nothing_else(tmp_path: Path) -> None:
    first = models.card(str(write_llama(tmp_path / "a")))
    same = models.card(str(write_llama(tmp_path / "b")))
    other = models.card(str(write_llama(tmp_path / "c", seed=1)))
    assert first.fingerprint == same.fingerprint != other.fingerprint
    (tmp_path / "b" / "README.md").unlink()
    assert models.card(str(tmp_path / "b")).fingerprint == first.fingerprint
    edit_json(tmp_path / "b" / "config.json", rms_norm_eps=0.5)
    assert models.card(str(tmp_path / "b")).fingerprint != first.fingerprint


def test_tied_embeddings_that_were_saved_twice_count_once(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "untied", tied=False)
    untied = models.card(str(folder)).parameters
    edit_json(folder / "config.json", tie_word_embeddings=True)
    assert untied - models.card(str(folder)).parameters == 31 * 16


def test_shards_load(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "sharded", shards=True)
    assert len(list(folder.glob("*.safetensors"))) > 1
    whole = models.load(str(write_llama(tmp_path / "whole"))).network.state_dict()
    for name, tensor in models.load(str(folder)).network.state_dict().items():
        assert torch.equal(tensor, whole[name])


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "sharded", shards=True)
    gone = sorted(folder.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ModelCorrupt, match=gone.name):
        models.load(str(folder))


def test_a_shard_outside_the_folder_is_refused(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "sharded", shards=True)
    index = folder / "model.safetensors.index.json"
    edit_json(index, weight_map={"x": "../other.safetensors"})
    with pytest.raises(ModelCorrupt, match="not a shard beside it"):
        models.load(str(folder))


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        models.load(str(tmp_path))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_type": 3}', "{}", "\x00\xff"])
def test_a_broken_config(tiny_folder: Path, text: str) -> None:
    (tiny_folder / "config.json").write_text(text, "latin-1")
    with pytest.raises(ModelCorrupt, match=r"config\.json"):
        models.load(str(tiny_folder))


def test_a_missing_config_beside_weights_is_damage(tiny_folder: Path) -> None:
    (tiny_folder / "config.json").unlink()
    with pytest.raises(ModelCorrupt, match=r"config\.json is missing"):
        models.load(str(tiny_folder))


def test_missing_weights(tiny_folder: Path) -> None:
    (tiny_folder / "model.safetensors").unlink()
    with pytest.raises(ModelCorrupt, match="no weights"):
        models.load(str(tiny_folder))


def test_pickled_weights_are_refused_with_the_reason(tiny_folder: Path) -> None:
    (tiny_folder / "model.safetensors").rename(tiny_folder / "pytorch_model.bin")
    with pytest.raises(ModelUnsupported, match=r"pytorch_model\.bin.*runs whatever code"):
        models.load(str(tiny_folder))


def test_a_missing_tokenizer(tiny_folder: Path) -> None:
    (tiny_folder / "tokenizer.json").unlink()
    with pytest.raises(ModelCorrupt, match="no tokenizer"):
        models.load(str(tiny_folder))


def test_a_broken_tokenizer(tiny_folder: Path) -> None:
    (tiny_folder / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ModelCorrupt, match="tokenizer"):
        models.load(str(tiny_folder))


@pytest.mark.parametrize("keep", [0, 4, 7, 8, 100, -5000, -1])
def test_truncated_weights_say_how_much_is_there(tiny_folder: Path, keep: int) -> None:
    file = tiny_folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:keep])
    with pytest.raises(ModelCorrupt, match=f"has {len(data[:keep])} bytes, expected") as caught:
        models.load(str(tiny_folder))
    if keep < 0:
        assert str(len(data)) in str(caught.value)


def test_weights_with_something_appended(tiny_folder: Path) -> None:
    with (tiny_folder / "model.safetensors").open("ab") as file:
        file.write(b"more")
    with pytest.raises(ModelCorrupt, match="expected"):
        models.load(str(tiny_folder))


@given(st.binary(max_size=200))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_a_header_or_an_error(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "model.safetensors"
    for content in (data, len(data).to_bytes(8, "little") + data):
        file.write_bytes(content)
        try:
            safetensors_header(file)
        except ModelError as error:
            assert str(file) in str(error)


def test_a_tensor_that_config_asks_for_is_missing(tiny_folder: Path) -> None:
    edit_json(tiny_folder / "config.json", num_hidden_layers=3)
    with pytest.raises(ModelCorrupt, match=r"lacks 9 tensors.*layers\.2"):
        models.load(str(tiny_folder))


def test_shapes_that_disagree_with_config(tiny_folder: Path) -> None:
    edit_json(tiny_folder / "config.json", intermediate_size=48)
    with pytest.raises(ModelCorrupt, match="shapes"):
        models.load(str(tiny_folder))


def test_an_unknown_model_type(tiny_folder: Path) -> None:
    edit_json(tiny_folder / "config.json", model_type="lama", auto_map={"AutoModel": "x.Y"})
    with pytest.raises(ModelUnsupported, match=r"'lama'.*never run.*did you mean"):
        models.load(str(tiny_folder))


def test_packed_weights(tiny_folder: Path) -> None:
    edit_json(tiny_folder / "config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(ModelUnsupported, match="gptq"):
        models.load(str(tiny_folder))


def test_no_context_length(tiny_folder: Path) -> None:
    edit_json(tiny_folder / "config.json", max_position_embeddings=None)
    with pytest.raises(ModelUnsupported, match="max_position_embeddings"):
        models.card(str(tiny_folder))
    edit_json(tiny_folder / "config.json", n_positions=77)
    assert models.card(str(tiny_folder)).context_length == 77


def test_an_encoder_is_not_a_language_model(tmp_path: Path) -> None:
    with pytest.raises(ModelUnsupported, match="load_encoder"):
        models.load(str(write_bert(tmp_path / "bert")))


def test_an_adapter_is_not_a_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelUnsupported, match="adapter"):
        models.load(str(tmp_path))


def test_a_file_inside_a_model(tiny_folder: Path) -> None:
    with pytest.raises(ModelNotFound, match="name the folder"):
        models.load(str(tiny_folder / "model.safetensors"))


@pytest.mark.parametrize("options", [{"dtype": "float7"}, {"device": "cuda:99"}, {"device": "no"}])
def test_impossible_options(tiny_folder: Path, options: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError):
        models.load(str(tiny_folder), **options)


@pytest.mark.parametrize("name", ["", " ", "a\0b"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(ConfigurationError):
        resolve(name)


def test_a_wrong_path_suggests_its_neighbour(tiny_folder: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"did you mean.*tiny-llama"):
        models.load(str(tiny_folder.parent / "tiny-lama"))
    with pytest.raises(ModelNotFound):
        models.load("a" * 5000)


def test_a_tokenizer_larger_than_the_network_is_reported(
    tiny_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tiny_folder)
    models.load(str(tiny_folder))
    assert "knows 32 tokens, the network only 31" in caplog.text


def test_settings_of_transformers_are_as_before(tiny_folder: Path) -> None:
    from transformers.utils import logging

    before = (logging.get_verbosity(), logging.is_progress_bar_enabled())
    models.load(str(tiny_folder))
    shutil.rmtree(tiny_folder)
    with pytest.raises(ModelError):
        models.load(str(tiny_folder))
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
