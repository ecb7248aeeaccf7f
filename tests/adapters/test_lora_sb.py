"""LoRA-SB: the initialisation, exact averaging, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch import adapters
from anabranch.adapters.lora_sb import (
    AdapterError,
    estimate_gradients,
    fingerprint,
    initialise,
)
from tests.adapters.models import MODELS, batch


def built(family: str = "llama", r: int = 8, **options: Any) -> Any:
    return adapters.build("lora_sb", MODELS[family](), r=r, **options).eval()


def losses(model: Any, parts: int = 1) -> list[Any]:
    """Loss functions over equal parts of four rows, which add up to the sum over the rows."""
    rows = batch(4).chunk(parts)
    return [
        lambda ids=ids: model(input_ids=ids, labels=ids).loss * len(ids)  # type: ignore[misc]
        for ids in rows
    ]


def layers_of(model: Any) -> dict[str, Any]:
    return {layer.site.name: layer for layer in model.modules() if hasattr(layer, "site")}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradients_are_those_of_the_base(family: str) -> None:
    base = MODELS[family]()
    for ids in batch(4).split(1):
        base(input_ids=ids, labels=ids).loss.backward()
    model = built(family)
    gradients = estimate_gradients(model, losses(model, parts=4))
    assert gradients.keys() == layers_of(model).keys()
    for name, gradient in gradients.items():
        expected = base.get_submodule(name).weight.grad
        expected = expected.T if family == "gpt2" else expected
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    assert all(p.grad is None and not p.requires_grad for p in base_parameters(model))
    assert sum(p.requires_grad for p in model.parameters()) == len(gradients)


def base_parameters(model: Any) -> list[torch.Tensor]:
    return [p for name, p in model.named_parameters() if "anabn" not in name]


def test_begins_as_the_best_rank_r_form_of_the_first_step() -> None:
    model = built(r=3)
    gradients = estimate_gradients(model, losses(model))
    initialise(model, gradients, learning_rate=1e-3)
    for name, layer in layers_of(model).items():
        branch = layer.branches["default"]
        update = -1e-3 * torch.sign(gradients[name])
        u, s, v = torch.linalg.svd(update)
        best = u[:, :3] @ torch.diag(s[:3]) @ v[:3]
        ours = branch.B @ branch.R.weight @ branch.A
        # 16 x 48 takes the exact path, 48 x 48 the randomised one; its error is of second order.
        error = torch.linalg.norm(update - ours) / torch.linalg.norm(update - best)
        assert 1 - 1e-4 <= error <= 1.01
        eye = torch.eye(3)
        torch.testing.assert_close(branch.B.T @ branch.B, eye, rtol=0, atol=1e-5)
        torch.testing.assert_close(branch.A @ branch.A.T, eye, rtol=0, atol=1e-5)


def test_the_first_step_lowers_the_loss() -> None:
    model = built(r=8)
    before = losses(model)[0]().item()
    initialise(model, estimate_gradients(model, losses(model)), learning_rate=1e-3)
    assert losses(model)[0]().item() < before


def test_starts_as_the_base_until_initialised() -> None:
    expected = MODELS["llama"]()(batch()).logits
    assert torch.equal(built()(batch()).logits, expected)


@settings(max_examples=10, deadline=None)
@given(weights=st.lists(st.floats(0.01, 1.0), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_averaging_the_core_is_averaging_the_update(weights: list[float], seed: int) -> None:
    torch.manual_seed(seed)
    branch = next(iter(layers_of(built()).values())).branches["default"]
    share = torch.tensor(weights) / sum(weights)
    cores = torch.randn(len(weights), 8, 8)
    averaged = branch.B @ torch.einsum("i,ijk->jk", share, cores) @ branch.A
    updates = torch.stack([branch.B @ core @ branch.A for core in cores])
    torch.testing.assert_close(
        averaged, torch.einsum("i,ijk->jk", share, updates), rtol=1e-4, atol=1e-6
    )


def test_parties_that_build_alike_hold_the_same_factors() -> None:
    torch.manual_seed(1)
    first = fingerprint(built())
    torch.manual_seed(2)
    assert fingerprint(built()) == first
    assert fingerprint(built(seed=1)) != first
    assert fingerprint(built(r=4)) != first


def test_the_factors_are_stored(tmp_path: Any) -> None:
    model = built()
    initialise(model, estimate_gradients(model, losses(model)), learning_rate=1e-3)
    adapters.save(model, tmp_path / "a")
    loaded = adapters.load(MODELS["llama"](), tmp_path / "a")
    assert fingerprint(loaded) == fingerprint(model) != fingerprint(built())


def test_only_the_chosen_adapter_is_initialised() -> None:
    model = built()
    adapters.build("lora_sb", model, "other", r=8)
    before = fingerprint(model, "default")
    gradients = estimate_gradients(model, losses(model))
    initialise(model, gradients, learning_rate=1e-3, adapter="other")
    assert fingerprint(model, "default") == before != fingerprint(model, "other")


def test_a_rank_that_a_layer_does_not_allow() -> None:
    model = MODELS["llama"]()
    with pytest.raises(AdapterError, match=r"r=17 .*k_proj allows, which is 16 x 48; at most 16"):
        adapters.build("lora_sb", model, r=17)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda g: g.zero_(), "zero everywhere"),
        (lambda g: g.fill_(float("nan")), "NaN"),
        (lambda g: g.resize_(2, 2).fill_(1), r"is \[2, 2\], not"),
    ],
)
def test_gradients_that_span_no_subspace(spoil: Any, message: str) -> None:
    model = built()
    gradients = estimate_gradients(model, losses(model))
    before = fingerprint(model)
    spoil(gradients["model.layers.1.mlp.up_proj"])
    with pytest.raises(AdapterError, match=f"layers.1.mlp.up_proj.*{message}"):
        initialise(model, gradients, learning_rate=1e-3)
    assert fingerprint(model) == before, "nothing is changed"


def test_masked_labels_are_an_error() -> None:
    model = built()
    ids = batch()

    def loss() -> torch.Tensor:
        return model(input_ids=ids).logits.sum() * 0.0

    with pytest.raises(AdapterError, match="zero everywhere"):
        estimate_gradients(model, [loss])
    with pytest.raises(AdapterError, match="no gradient"):
        estimate_gradients(model, [])
