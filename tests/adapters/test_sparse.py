"""Sparse deltas and BitFit: what is chosen, ties, data that says nothing, storage."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from anabranch import adapters
from anabranch.adapters import AdapterError
from anabranch.adapters.sparse import choose, fisher_information, movement, sparse_layers, top
from tests.adapters.models import MODELS, batch


def built(name: str, family: str = "llama", **options: Any) -> Any:
    return adapters.build(name, MODELS[family](), **{"weights": 50, **options}).eval()


def losses(model: Any, rows: int = 3) -> list[Any]:
    return [
        lambda ids=ids: model(input_ids=ids, labels=ids).loss  # type: ignore[misc]
        for ids in batch(rows).split(1)
    ]


def mask(model: Any) -> dict[str, Tensor]:
    found = {}
    for name, layer in sparse_layers(model, "default").items():
        branch: Any = layer.branches["default"]
        chosen = torch.zeros(branch.shape, dtype=torch.bool).view(-1)
        chosen[branch.positions.long()] = True
        found[name] = chosen.view(branch.shape)
    return found


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 7), min_size=1, max_size=4),
    levels=st.integers(1, 5),
    data=st.data(),
)
def test_top_is_the_sorted_definition(sizes: list[int], levels: int, data: Any) -> None:
    scores = {
        str(i): torch.tensor(data.draw(st.lists(st.integers(0, levels), min_size=n, max_size=n)))
        for i, n in enumerate(sizes)
    }
    count = data.draw(st.integers(0, sum(sizes)))
    entries = [(-int(v), i, j) for i, n in enumerate(sizes) for j, v in enumerate(scores[str(i)])]
    expected = sorted(entries)[:count]
    found = [(i, int(j)) for i in range(len(sizes)) for j in top(scores, count)[str(i)]]
    assert found == sorted((i, j) for _, i, j in expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_pafi_takes_the_smallest_weights(family: str) -> None:
    model = built("pafi", family)
    chosen = mask(model)
    layers = sparse_layers(model, "default")
    inside = torch.cat([layers[n].site.weight[m].abs() for n, m in chosen.items()])
    outside = torch.cat([layers[n].site.weight[~m].abs() for n, m in chosen.items()])
    assert len(inside) == 50 and inside.max() <= outside.min()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_fishmask_takes_the_largest_mean_squared_gradients(family: str) -> None:
    base = MODELS[family]()
    expected: dict[str, Tensor] = {}
    for ids in batch(3).split(1):
        base.zero_grad()
        base(input_ids=ids, labels=ids).loss.backward()
        for name, module in base.named_modules():
            if hasattr(module, "weight") and module.weight is not None and name:
                expected[name] = expected.get(name, 0) + module.weight.grad.square() / 3
    model = built("fishmask", family)
    scores = fisher_information(model, losses(model))
    for name, score in scores.items():
        wanted = expected[name].T if family == "gpt2" else expected[name]
        torch.testing.assert_close(score, wanted, rtol=1e-4, atol=1e-8)
    choose(model, scores)
    chosen = mask(model)
    inside = torch.cat([scores[name][m] for name, m in chosen.items()])
    outside = torch.cat([scores[name][~m] for name, m in chosen.items()])
    assert len(inside) == 50 and inside.min() >= outside.max()
    own = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in own) == 50


def test_lt_sft_takes_what_moved_most_and_rewinds() -> None:
    model = built("lt_sft")
    before = {name: p.clone() for name, p in model.named_parameters()}

    def tune() -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        assert len(trained) == 14 and all(p.dim() == 2 for p in trained)
        optimiser = torch.optim.SGD(trained, lr=0.1)
        for loss in losses(model):
            optimiser.zero_grad()
            loss().backward()
            optimiser.step()

    moved = movement(model, tune)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    choose(model, moved)
    chosen = mask(model)
    inside = torch.cat([moved[name][m] for name, m in chosen.items()])
    outside = torch.cat([moved[name][~m] for name, m in chosen.items()])
    assert inside.min() >= outside.max() > 0


def test_training_changes_the_chosen_entries_only() -> None:
    model = built("pafi")
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for loss in losses(model):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()
    chosen = mask(model)
    merged: Any = adapters.merge(model)
    base = MODELS["llama"]()
    for name, own in chosen.items():
        changed = merged.get_submodule(name).weight != base.get_submodule(name).weight
        assert not (changed & ~own).any()
        assert changed.sum() == own.sum()


def test_a_choice_is_stored(tmp_path: Any) -> None:
    model = built("fishmask")
    choose(model, fisher_information(model, losses(model)))
    with torch.no_grad():
        for layer in sparse_layers(model, "default").values():
            layer.branches["default"].values.normal_()
    adapters.save(model, tmp_path / "a")
    loaded = adapters.load(MODELS["llama"](), tmp_path / "a", "other", trainable=True)
    assert torch.equal(loaded.eval()(batch()).logits, model(batch()).logits)
    for name, layer in sparse_layers(loaded, "other").items():
        own = sparse_layers(model, "default")[name].branches["default"]
        assert torch.equal(layer.branches["other"].positions, own.positions)
        assert layer.branches["other"].positions.dtype == torch.int32
    size = (tmp_path / "a" / "adapter_model.safetensors").stat().st_size
    assert size < 50 * 8 + 14 * 2 * 150, "positions and values, no dense tensors"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: [x.zero_() for x in s.values()], "all scores are zero"),
        (lambda s: next(iter(s.values())).fill_(float("inf")), "NaN or infinite"),
        (lambda s: s.pop("model.layers.0.mlp.up_proj"), r"mlp.up_proj are none, not \[64, 48\]"),
    ],
)
def test_scores_that_choose_nothing_change_nothing(spoil: Any, message: str) -> None:
    model = built("fishmask")
    scores = fisher_information(model, losses(model))
    before = mask(model)
    spoil(scores)
    with pytest.raises(AdapterError, match=message):
        choose(model, scores)
    assert all(torch.equal(mask(model)[name], own) for name, own in before.items())


def test_no_sample_and_too_many_weights() -> None:
    model = built("fishmask")
    with pytest.raises(AdapterError, match="at least one sample"):
        fisher_information(model, [])
    with pytest.raises(AdapterError, match="is more than the 30,720 targeted"):
        built("pafi", weights=30_721)
    assert built("pafi", weights=30_720)
    with pytest.raises(AdapterError, match="share is in"):
        adapters.build("pafi", MODELS["llama"](), share=0.0)


def test_bitfit_is_training_the_biases() -> None:
    base = MODELS["gpt2"]()
    biases = sum(p.numel() for name, p in base.named_parameters() if name.endswith("bias"))
    assert adapters.trainable_parameters("bitfit", base) == biases
    model: Any = adapters.build("bitfit", MODELS["gpt2"]())
    model(input_ids=batch(), labels=batch()).loss.backward()
    base(input_ids=batch(), labels=batch()).loss.backward()
    for layer in model.modules():
        if hasattr(layer, "site"):
            expected = base.get_submodule(layer.site.name).bias.grad
            torch.testing.assert_close(layer.branches["default"].delta.grad, expected)


def test_bitfit_adds_no_biases() -> None:
    with pytest.raises(AdapterError, match="q_proj has no bias, and BitFit adds none"):
        adapters.build("bitfit", MODELS["llama"](), target_modules=["q_proj"])
    with pytest.raises(AdapterError, match="Sequential has none"):
        adapters.build("bitfit", nn.Sequential(nn.Linear(3, 3, bias=False)))
