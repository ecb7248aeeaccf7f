"""Bottleneck adapters: sites, initialisation, counts, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from anabranch import adapters
from anabranch.adapters.bottleneck import PLACES
from tests.adapters.models import MODELS, batch

SITES = {
    "series_input": {"llama": {"gate_proj", "up_proj"}, "gpt2": {"c_fc"}},
    "series_output": {"llama": {"down_proj"}, "gpt2": {"c_proj"}},
    "parallel": {"llama": {"gate_proj", "up_proj", "down_proj"}, "gpt2": {"c_fc", "c_proj"}},
}


@pytest.mark.parametrize("placement", PLACES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_starts_as_the_base_at_the_papers_sites(placement: str, family: str) -> None:
    base = MODELS[family]()
    expected = base(batch()).logits
    name = {"series_output": "pfeiffer"}.get(placement, placement)
    model = adapters.build(name, base, bottleneck_size=4)
    assert torch.equal(model(batch()).logits, expected)
    sites = {name.rpartition(".")[2] for name in model.base_model.targeted_module_names}
    assert sites == SITES[placement][family]
    assert not any("attn" in name for name in model.base_model.targeted_module_names)


def test_bert_initialisation_does_not() -> None:
    base = MODELS["llama"]()
    expected = base(batch()).logits
    model = adapters.build("bottleneck", base, init="bert", bottleneck_size=4)
    assert not torch.allclose(model(batch()).logits, expected)


def test_houlsby_goes_after_attention_and_feed_forward() -> None:
    model = adapters.build("houlsby", MODELS["gpt2"](), bottleneck_size=4)
    assert model.base_model.targeted_module_names == [
        f"transformer.h.{layer}.{block}.c_proj" for layer in (0, 1) for block in ("attn", "mlp")
    ]


@pytest.mark.parametrize("scaling", [1.0, "learned"])
@pytest.mark.parametrize("size", [1, 7])
def test_counts_what_the_formula_says(size: int, scaling: Any) -> None:
    model = MODELS["llama"]()
    widths = {"gate_proj": 48 + 64, "up_proj": 48 + 64, "down_proj": 64 + 48}
    expected = 2 * sum(size * width + (scaling == "learned") for width in widths.values())
    options = {"bottleneck_size": size, "scaling": scaling}
    assert adapters.trainable_parameters("parallel", model, **options) == expected
    series = 2 * (size * 2 * 48 + (scaling == "learned"))
    assert adapters.trainable_parameters("pfeiffer", model, **options) == series


def test_scaled_parallel_is_four_times_parallel() -> None:
    outputs = []
    for name in ("parallel", "scaled_parallel"):
        torch.manual_seed(0)
        model = adapters.build(
            name, MODELS["llama"](), init="bert", bottleneck_size=4, target_modules=["down_proj"]
        )
        layer: Any = model.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
        x = torch.randn(2, 64)
        outputs.append(layer(x) - layer.base_layer(x))
    torch.testing.assert_close(outputs[1], 4 * outputs[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"placement": "sideways"}, "placement='sideways'"),
        ({"activation": "swish"}, "activation='swish'"),
        ({"bottleneck_size": 0}, "bottleneck_size is at least 1, not 0"),
        ({"bottleneck_size": "many"}, "bottleneck_size='many' is not a value of type int"),
        ({"dropout": 1.0}, "dropout is in"),
        ({"scaling": "big"}, "scaling='big'"),
        ({"botleneck_size": 4}, "did you mean 'bottleneck_size'"),
    ],
)
def test_refuses_options_before_the_model_is_touched(options: Any, message: str) -> None:
    model = MODELS["llama"]()
    with pytest.raises(adapters.AdapterError, match=message):
        adapters.build("bottleneck", model, **options)
    assert all(p.requires_grad for p in model.parameters())


def test_merging_a_nonlinear_one_says_why() -> None:
    model = adapters.build("pfeiffer", MODELS["llama"](), bottleneck_size=4)
    with pytest.raises(adapters.NotMergeable, match=r"tanh is not linear.*'identity'"):
        adapters.merge(model)


def test_refuses_modules_it_cannot_adapt() -> None:
    model = MODELS["llama"]()
    with pytest.raises(
        adapters.AdapterError, match=r"cannot adapt .*input_layernorm, a LlamaRMSNorm"
    ):
        adapters.build("bottleneck", model, target_modules=["norm"])
    assert not hasattr(model, "peft_config")
    assert all(p.requires_grad for p in model.parameters())
