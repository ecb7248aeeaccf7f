"""One battery that every method of the catalogue passes, on networks of three families.

What the catalogue says of a method (merges, mixes, holds two adapters, counts) is compared with
what the method does, both ways: a method that could more than it claims fails, too.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor, nn

from anabranch import adapters, registry
from anabranch.adapters import AdapterError, MethodInfo, NotMergeable, catalogue
from anabranch.adapters.catalogue import LEAVES
from anabranch.adapters.peft_methods import UNAVAILABLE
from tests.adapters.models import MODELS, OPTIONS, batch

CATALOGUE = catalogue()
OURS = list(registry.available("adapters"))
"""Without presets, which differ from their method in options only."""
UNSUPPORTED = {
    ("adaption_prompt", "qwen2"): "Unsupported model type",
    ("beft", "gpt2"): "specify `target_modules`",
    ("bitfit", "llama"): "has none in its linear and norm modules",
} | {(name, "gpt2"): "a Conv1D" for name, info in CATALOGUE.items() if not info.conv1d}
"""Methods that refuse a network, and what they say."""
CASES = [
    (name, family)
    for family in MODELS
    for name in (CATALOGUE if family == "llama" else [*OURS, "lora", "prefix_tuning"])
    if (name, family) not in UNSUPPORTED
]


@dataclass
class Trained:
    """A method on a network after a few steps, with what it gave before and after."""

    name: str
    family: str
    model: Any
    counted: int
    base: Tensor
    losses: tuple[float, float]
    output: Tensor

    @property
    def info(self) -> MethodInfo:
        return CATALOGUE[self.name]

    def copy(self) -> Any:
        return copy.deepcopy(self.model)

    def equal(self, left: Tensor, right: Tensor) -> bool:
        # CPT projects its weights onto a ball in every forward pass.
        return torch.allclose(left, right, atol=1e-4) if self.name == "cpt" else left.equal(right)


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def trained(request: Any) -> Trained:
    name, family = request.param
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    base = MODELS[family]()
    counted = adapters.trainable_parameters(name, base, **OPTIONS.get(name, {}))
    before = logits(base)
    own = {id(parameter) for parameter in base.parameters()}
    model = adapters.build(name, base, **OPTIONS.get(name, {})).eval()
    losses = train(model, name)
    for parameter in model.parameters():
        if id(parameter) in own:
            assert parameter.grad is None and not parameter.requires_grad
    return Trained(name, family, model, counted, before, losses, logits(model, name))


def extra(name: str, rows: int) -> dict[str, Any]:
    task_ids = torch.zeros(rows, dtype=torch.long)
    return {"task_ids": task_ids} if name and CATALOGUE[name].inputs else {}


@torch.no_grad()
def logits(model: nn.Module, name: str = "", rows: int = 2, **more: Any) -> Tensor:
    return model(input_ids=batch(rows), **extra(name, rows), **more).logits


def train(model: Any, name: str, steps: int = 5, lr: float = 1e-2) -> tuple[float, float]:
    """Loss before and after, without dropout and noise."""

    def loss() -> Tensor:
        return model(input_ids=batch(), labels=batch(), **extra(name, 2)).loss

    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    before = loss().item()
    model.train()
    for _ in range(steps):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()
    model.eval()
    return before, loss().item()


def second(trained: Trained) -> tuple[Any, Tensor]:
    """A copy with a second adapter, trained differently, and what that one gives."""
    model = trained.copy()
    adapters.build(trained.name, model, "second", **OPTIONS.get(trained.name, {}))
    model.eval()
    assert trained.equal(logits(model, trained.name), trained.output), "a new one is not active"
    model.set_adapter("second")
    train(model, trained.name, lr=2e-2)
    return model, logits(model, trained.name)


def test_trains_its_own_weights_and_counts_them(trained: Trained) -> None:
    assert trained.losses[1] < trained.losses[0]
    own = [p for p in trained.model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in own) == trained.counted > 0


def test_disabled_is_the_base_bit_for_bit(trained: Trained) -> None:
    with trained.model.disable_adapter():
        assert torch.equal(logits(trained.model), trained.base)
    length = trained.base.shape[1]
    assert not torch.equal(logits(trained.model, trained.name)[:, -length:], trained.base)


def test_a_stored_adapter_is_the_same_adapter(trained: Trained, tmp_path: Path) -> None:
    adapters.save(trained.model, tmp_path / "stored")
    torch.manual_seed(99)
    loaded = adapters.load(MODELS[trained.family](), tmp_path / "stored", "again")
    assert trained.equal(logits(loaded, trained.name), trained.output)
    assert not any(p.requires_grad for p in loaded.parameters())


def test_merges_if_the_catalogue_says_so(trained: Trained) -> None:
    model = trained.copy()
    if not trained.info.mergeable or trained.name == "beft":  # no biases in a Llama
        with pytest.raises(NotMergeable, match=r"cannot be merged: \w+"):
            adapters.merge(model)
        assert trained.equal(logits(model, trained.name), trained.output)
        return
    merged = adapters.merge(model)
    error = (logits(merged) - trained.output).abs().max()
    assert error <= 1e-5 * trained.output.abs().max()
    assert merged.state_dict().keys() >= MODELS[trained.family]().state_dict().keys()


def test_holds_two_adapters_and_switches(trained: Trained) -> None:
    if not trained.info.multi_adapter:
        with pytest.raises(AdapterError):
            second(trained)
        return
    model, output = second(trained)
    assert not torch.equal(output, trained.output)
    model.set_adapter("default")
    assert trained.equal(logits(model, trained.name), trained.output)
    model.delete_adapter("second")
    assert trained.equal(logits(model, trained.name), trained.output)


def test_rows_choose_their_adapter_if_the_catalogue_says_so(trained: Trained) -> None:
    if not trained.info.multi_adapter:
        return
    model, other = second(trained)
    model.set_adapter("default")
    length = trained.base.shape[1]
    wanted = torch.stack([other[0, -length:], trained.base[1]])
    try:
        mixed = logits(model, trained.name, adapter_names=["second", "__base__"])
        chosen = torch.allclose(mixed[:, -length:], wanted, rtol=1e-5, atol=1e-4)
    except (ValueError, TypeError):
        chosen = False
    assert chosen == trained.info.mixed_batch


@pytest.mark.parametrize(
    ("name", "family", "message"), [(*case, message) for case, message in UNSUPPORTED.items()]
)
def test_a_network_it_cannot_adapt_is_left_as_it_was(name: str, family: str, message: str) -> None:
    model = MODELS[family]()
    before = {key: (value.clone(), value.requires_grad) for key, value in model.named_parameters()}
    with pytest.raises(AdapterError, match=message):
        adapters.build(name, model, **OPTIONS.get(name, {}))
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for key, (value, requires_grad) in before.items():
        assert torch.equal(after[key], value) and after[key].requires_grad == requires_grad
    adapters.build("lora", model)  # and can be adapted by another method


def test_beft_merges_where_there_are_biases() -> None:
    model = adapters.build("beft", MODELS["qwen2"]()).eval()
    train(model, "beft")
    output = logits(model)
    torch.testing.assert_close(logits(adapters.merge(model)), output)


def test_every_type_of_peft_is_in_the_catalogue_or_excused() -> None:
    listed = {info.config for info in CATALOGUE.values()}
    for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        assert config in listed or kind.value in UNAVAILABLE, kind
    assert all(reason for reason in UNAVAILABLE.values())


def test_every_entry_stands_somewhere_in_the_taxonomy() -> None:
    for info in CATALOGUE.values():
        assert (info.family, info.leaf) in LEAVES
        assert info.summary.endswith(".") and info.paper
        assert info.mergeable or info.merge_note
