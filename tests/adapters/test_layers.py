"""What all our methods share: order on a layer, rows, merging, against the naive computation."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from anabranch import adapters
from anabranch.adapters.base import AdaptedLayer
from anabranch.adapters.bottleneck import PLACES, BottleneckConfig
from tests.adapters.models import MODELS, batch


class Net(nn.Module):
    """One module to adapt, and a second one."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = inner or nn.Linear(6, 5)
        self.outer = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(x)))


def conv1d() -> Conv1D:
    module = Conv1D(5, 6)
    nn.init.normal_(module.weight)
    nn.init.normal_(module.bias)
    return module


def adapted(placements: list[str], inner: nn.Module | None = None, **options: Any) -> Any:
    """A float64 net whose ``inner`` has one random adapter per placement, all active."""
    torch.manual_seed(1)
    model: Any = Net(inner).double()
    for index, placement in enumerate(placements):
        config = BottleneckConfig(
            target_modules=["inner"],
            placement=placement,
            bottleneck_size=2,
            init="bert",
            **options,
        )
        if index:
            model.add_adapter(f"a{index}", config)
        else:
            model = get_peft_model(model, config, adapter_name="a0")
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter)
    model.base_model.set_adapter([f"a{index}" for index in range(len(placements))])
    return model.eval()


def layer_of(model: nn.Module) -> AdaptedLayer:
    return next(module for module in model.modules() if isinstance(module, AdaptedLayer))


def naive(layer: AdaptedLayer, x: Tensor, names: list[str]) -> Tensor:
    """The order that the documentation promises, written out."""

    def delta(name: str, z: Tensor) -> Tensor:
        branch: Any = layer.branches[name]
        hidden = z @ branch.down.T
        hidden = torch.tanh(hidden) if branch.activation == "tanh" else hidden
        return hidden @ branch.up.T * branch.scale

    by_place = {
        place: [name for name in names if layer.branches[name].place == place]
        for place in PLACES.values()
    }
    for name in by_place["input"]:
        x = x + delta(name, x)
    y = layer.base_layer(x)
    y = y + sum(delta(name, x) for name in by_place["parallel"])
    for name in by_place["output"]:
        y = y + delta(name, y)
    return y


@pytest.mark.parametrize(
    "placements", [list(p) for n in (1, 2, 3) for p in itertools.product(PLACES, repeat=n)], ids=str
)
def test_several_adapters_act_in_the_promised_order(placements: list[str]) -> None:
    model = adapted(placements, activation="tanh")
    layer, x = layer_of(model), torch.randn(4, 6, dtype=torch.float64)
    names = [f"a{index}" for index in range(len(placements))]
    torch.testing.assert_close(layer(x), naive(layer, x, names), rtol=0, atol=1e-12)


@pytest.mark.parametrize("inner", [None, conv1d(), nn.Linear(6, 5, bias=False)], ids=str)
@pytest.mark.parametrize(
    "placements", [list(p) for n in (1, 2, 3) for p in itertools.product(PLACES, repeat=n)], ids=str
)
def test_merged_equals_unmerged_in_float64(placements: list[str], inner: nn.Module | None) -> None:
    model = adapted(placements, inner, activation="identity", scaling=0.7)
    layer, x = layer_of(model), torch.randn(4, 6, dtype=torch.float64)
    expected, weight = model(x), layer.get_base_layer().weight.clone()
    model.base_model.merge_adapter()
    assert layer.merged_adapters == [f"a{index}" for index in range(len(placements))]
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-10)
    model.base_model.unmerge_adapter()
    assert torch.equal(layer.get_base_layer().weight, weight)
    assert torch.equal(model(x), expected)


def test_merging_one_by_one_equals_merging_together() -> None:
    model = adapted(["series_output", "series_input", "parallel"], activation="identity")
    x = torch.randn(4, 6, dtype=torch.float64)
    expected = model(x)
    for index in range(3):
        model.base_model.merge_adapter([f"a{index}"])
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-10)


def test_a_merged_layer_disabled_is_the_base_bit_for_bit() -> None:
    model = adapted(["parallel"], activation="identity")
    x = torch.randn(4, 6, dtype=torch.float64)
    with model.disable_adapter():
        base = model(x)
    model.base_model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x), base)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.sampled_from(["a0", "a1", "a2", "__base__"]), min_size=1, max_size=6),
    placements=st.lists(st.sampled_from(list(PLACES)), min_size=3, max_size=3),
)
def test_rows_equal_separate_runs(rows: list[str], placements: list[str]) -> None:
    model = adapted(placements)
    x = torch.randn(len(rows), 3, 6, dtype=torch.float64)
    mixed = model(x, adapter_names=rows)
    for row, name in enumerate(rows):
        if name == "__base__":
            with model.disable_adapter():
                alone = model(x[row : row + 1])
        else:
            model.base_model.set_adapter(name)
            alone = model(x[row : row + 1])
        torch.testing.assert_close(mixed[row : row + 1], alone, rtol=0, atol=1e-12)


def test_rows_are_checked() -> None:
    model = adapted(["parallel"], activation="identity")
    x = torch.randn(2, 6, dtype=torch.float64)
    with pytest.raises(adapters.AdapterError, match="no adapter nobody; the model has a0"):
        model(x, adapter_names=["a0", "nobody"])
    with pytest.raises(adapters.AdapterError, match="3 names, but inner sees 2 rows"):
        model(x, adapter_names=["a0"] * 3)
    with pytest.raises(adapters.AdapterError, match="eval"):
        model.train()(x, adapter_names=["a0", "a0"])
    model.eval().base_model.merge_adapter()
    with pytest.raises(adapters.AdapterError, match="unmerge_adapter"):
        model(x, adapter_names=["a0", "a0"])
    model.base_model.unmerge_adapter()
    assert torch.isfinite(model(x)).all(), "a refusal leaves no rows behind"


def test_rows_repeat_for_beams() -> None:
    model = adapters.build("ssf", MODELS["llama"](), init_std=0.5).eval()
    options = {"max_new_tokens": 3, "num_beams": 2, "do_sample": False, "pad_token_id": 0}
    alone = model.generate(input_ids=batch(1), **options)
    mixed = model.generate(input_ids=batch(1), adapter_names=["default"], **options)
    assert torch.equal(alone, mixed)


def test_an_adapter_on_other_modules_stays_inactive_until_chosen() -> None:
    model = adapted(["parallel"])
    x = torch.randn(2, 6, dtype=torch.float64)
    before = model(x)
    model.add_adapter(
        "elsewhere",
        BottleneckConfig(target_modules=["outer"], bottleneck_size=2, init="bert"),
    )
    assert torch.equal(model(x), before)
    model.base_model.set_adapter("elsewhere")
    assert not torch.equal(model(x), before)


def test_a_narrow_base_is_adapted_in_float32() -> None:
    base = Net().to(torch.bfloat16)
    model = adapters.build("parallel", base, target_modules=["inner"], bottleneck_size=2)
    branch: Any = layer_of(model).branches["default"]
    assert branch.down.dtype == branch.up.dtype == torch.float32
    seen: list[torch.dtype] = []
    branch.register_forward_hook(lambda _, args, out: seen.extend([args[0].dtype, out.dtype]))
    assert model(torch.randn(2, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert seen == [torch.float32, torch.float32]


def test_a_merge_that_overflows_changes_nothing() -> None:
    base = Net().half()
    model: Any = adapters.build("ssf", base, target_modules=["inner", "outer"])
    with torch.no_grad():
        branches = [
            layer.branches["default"] for layer in model.modules() if hasattr(layer, "site")
        ]
        branches[0].gamma.fill_(2.0)
        branches[1].gamma.fill_(1e30)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(adapters.NotMergeable, match="outer is not finite"):
        adapters.merge(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_a_broken_adapter_is_not_merged() -> None:
    model: Any = adapters.build("ssf", Net(), target_modules=["inner"])
    with torch.no_grad():
        layer_of(model).branches["default"].gamma[1] = float("nan")
    with pytest.raises(adapters.AdapterError, match=r"gamma has NaN.*nothing was merged"):
        adapters.merge(model)
