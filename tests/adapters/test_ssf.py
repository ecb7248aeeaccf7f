"""SSF: exact merging, norms included, and its one obstacle."""

from __future__ import annotations

import pytest
import torch

from anabranch import adapters
from tests.adapters.models import MODELS, batch


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("shift", [True, False])
def test_merges_exactly_in_float64(family: str, shift: bool) -> None:
    base = MODELS[family]().double()
    targets = ["all-linear", "norm"] if family == "gpt2" or not shift else ["all-linear"]
    model = adapters.build("ssf", base, shift=shift, init_std=0.3, target_modules=targets).eval()
    expected = model(batch()).logits
    torch.testing.assert_close(
        adapters.merge(model)(batch()).logits, expected, rtol=1e-10, atol=1e-9
    )


def test_is_the_formula() -> None:
    model = adapters.build("ssf", MODELS["llama"](), init_std=0.3, target_modules=["v_proj"])
    layer = model.get_submodule("base_model.model.model.layers.1.self_attn.v_proj")
    branch = layer.branches["default"]
    x = torch.randn(3, 48)
    expected = layer.base_layer(x) * branch.gamma + branch.beta
    assert torch.equal(layer(x), expected)


def test_a_shift_after_an_rmsnorm_is_not_mergeable() -> None:
    model = adapters.build("ssf", MODELS["llama"](), target_modules=["norm"])
    with pytest.raises(adapters.NotMergeable, match=r"layernorm has no bias.*shift=False"):
        adapters.merge(model)


def test_starts_as_the_base() -> None:
    base = MODELS["llama"]()
    expected = base(batch()).logits
    assert torch.equal(adapters.build("ssf", base)(batch()).logits, expected)
