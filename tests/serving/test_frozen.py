"""Frozen layers hand their weight to whoever attaches an adapter."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from anabranch.serving.runner.frozen import FrozenLinear, made_once


def counting(made: list[str], name: str) -> FrozenLinear:
    weight = torch.randn(3, 4)

    def dense() -> Tensor:
        made.append(name)
        return weight.clone()

    return FrozenLinear(4, 3, lambda x: x @ weight.T, lambda g: g @ weight, dense, None)


def test_a_weight_is_made_once_for_an_adapter_and_anew_elsewhere() -> None:
    made: list[str] = []
    model = nn.Sequential(counting(made, "first"), counting(made, "second"), nn.LayerNorm(3))
    weights = [layer.weight for layer in model[:2]]
    made.clear()
    with made_once():
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["0", "1"]))
        assert made == ["first", "second"]
        assert model[1].base_layer.weight.equal(weights[1]) and made == ["first", "second"]
    made.clear()
    layers = [module for module in adapted.modules() if isinstance(module, FrozenLinear)]
    for layer, weight in zip(layers, weights, strict=True):
        assert layer.weight.equal(weight) and layer.weight is not layer.weight
    assert len(made) == 6
