"""DyLoRA's truncation and SoRA's gates."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from anabranch import adapters
from anabranch.adapters import AdapterError
from anabranch.adapters.ranked import shrink_gates, truncate
from tests.adapters.models import MODELS, batch


def built(name: str, **options: Any) -> Any:
    torch.manual_seed(3)
    model = adapters.build(name, MODELS["llama"](), **options).eval()
    for branch in branches(model):
        torch.nn.init.normal_(branch.B, std=0.3)
    return model


def branches(model: Any) -> list[Any]:
    return [layer.branches["default"] for layer in model.modules() if hasattr(layer, "site")]


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_truncation_equals_a_model_built_at_that_rank(rank: int) -> None:
    model = built("dylora", r=6, alpha=6.0)
    small = adapters.build("dylora", MODELS["llama"](), r=rank, alpha=float(rank)).eval()
    with torch.no_grad():
        for own, cut in zip(branches(model), branches(small), strict=True):
            cut.A.copy_(own.A[:rank])
            cut.B.copy_(own.B[:, :rank])
    truncate(model, rank)
    expected = small(batch()).logits
    assert torch.equal(model(batch()).logits, expected)
    torch.testing.assert_close(adapters.merge(model)(batch()).logits, expected, rtol=0, atol=2e-4)


def test_a_truncation_is_stored(tmp_path: Any) -> None:
    model = built("dylora", r=6)
    full = model(batch()).logits
    truncate(model, 2)
    cut = model(batch()).logits
    assert not torch.allclose(full, cut)
    adapters.save(model, tmp_path / "a")
    loaded = adapters.load(MODELS["llama"](), tmp_path / "a")
    assert torch.equal(loaded(batch()).logits, cut)
    truncate(loaded, 6)
    assert torch.equal(loaded(batch()).logits, full)


def test_training_draws_every_rank_and_leaves_the_rest_alone() -> None:
    model = built("dylora", r=3, target_modules=["model.layers.0.mlp.up_proj"])
    (branch,) = branches(model)
    drawn = set()
    model.train()
    for _ in range(40):
        model.zero_grad()
        model(input_ids=batch(), labels=batch()).loss.backward()
        touched = branch.A.grad.abs().sum(1) > 0
        q = int(touched.sum())
        assert touched.tolist() == [True] * q + [False] * (3 - q), "a prefix of the ranks"
        drawn.add(q)
    assert drawn == {1, 2, 3}


@pytest.mark.parametrize("rank", [0, 7])
def test_a_rank_that_was_not_trained(rank: int) -> None:
    with pytest.raises(AdapterError, match=f"from 1 to r=6, not {rank}"):
        truncate(built("dylora", r=6), rank)
    with pytest.raises(AdapterError, match=f"from 1 to r=6, not {rank}"):
        built("dylora", r=6, rank=rank)
    with pytest.raises(AdapterError, match="no dylora adapter"):
        truncate(built("sora"), 1)


def test_gates_shrink_to_exactly_zero() -> None:
    model = built("sora", r=3)
    with torch.no_grad():
        for branch in branches(model):
            branch.gate.copy_(torch.tensor([0.5, -0.05, -0.3]))
    assert shrink_gates(model, 0.1) == 2 * len(branches(model))
    for branch in branches(model):
        torch.testing.assert_close(branch.gate.data, torch.tensor([0.4, 0.0, -0.2]))
    before = model(batch()).logits
    with torch.no_grad():
        for branch in branches(model):  # a closed rank says nothing
            branch.A[1].normal_()
    assert torch.equal(model(batch()).logits, before)


def test_gates_of_one_leave_a_lora() -> None:
    model = built("sora", r=3, alpha=3.0, target_modules=["up_proj"])
    layer = next(layer for layer in model.modules() if hasattr(layer, "site"))
    branch, x = layer.branches["default"], torch.randn(2, 48)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ branch.A.T @ branch.B.T)
    with pytest.raises(AdapterError, match="no sora adapter"):
        shrink_gates(built("dylora"), 0.1)
    with pytest.raises(AdapterError, match="from 0, not -1"):
        shrink_gates(model, -1)
