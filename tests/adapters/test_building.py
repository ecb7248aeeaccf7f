"""Names, options, targets and budgets: what is accepted, and how refusals read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from anabranch import adapters
from anabranch.adapters import AdapterError, resolve_targets
from anabranch.errors import UnknownName
from tests.adapters.models import MODELS, batch


@pytest.mark.parametrize(
    ("family", "preset", "expected"),
    [
        ("llama", "attention", ["k_proj", "o_proj", "q_proj", "v_proj"]),
        ("llama", "mlp", ["down_proj", "gate_proj", "up_proj"]),
        ("llama", "attention-output", ["o_proj"]),
        ("llama", "mlp-input", ["gate_proj", "up_proj"]),
        ("llama", "mlp-output", ["down_proj"]),
        ("llama", "norm", ["input_layernorm", "norm", "post_attention_layernorm"]),
        ("llama", "embedding", ["embed_tokens"]),
        ("gpt2", "attention", ["attn.c_proj", "c_attn"]),
        ("gpt2", "attention-output", ["attn.c_proj"]),
        ("gpt2", "mlp", ["c_fc", "mlp.c_proj"]),
        ("gpt2", "mlp-output", ["mlp.c_proj"]),
        ("gpt2", "all-linear", ["c_attn", "c_fc", "c_proj"]),
        ("gpt2", "norm", ["ln_1", "ln_2", "ln_f"]),
        ("gpt2", "embedding", ["wte"]),
    ],
)
def test_presets_become_names(family: str, preset: str, expected: list[str]) -> None:
    model = MODELS[family]()
    assert resolve_targets(model, preset) == expected
    adapters.build("ssf", model, target_modules=["all-linear"])
    assert resolve_targets(model, preset) == expected, "an adapted model is read as its base"


def test_presets_and_names_mix() -> None:
    model = MODELS["llama"]()
    wanted = ["mlp-output", "q_proj", "layers.1.self_attn.v_proj"]
    assert resolve_targets(model, wanted) == ["down_proj", "layers.1.self_attn.v_proj", "q_proj"]
    built = adapters.build("lora", model, target_modules=wanted)
    assert len(built.base_model.targeted_module_names) == 2 + 2 + 1


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_prj"], "nearest: q_proj, .*, .*, .*, "),
        (["q_proj", "w"], "no module is named 'w'"),
        (["al-linear"], "did you mean 'all-linear'"),
        ([], "is empty"),
        ("", "no module is named ''"),
    ],
)
def test_unmatched_targets_name_the_nearest(targets: Any, message: str) -> None:
    model = MODELS["llama"]()
    with pytest.raises(AdapterError, match=message):
        adapters.build("lora", model, target_modules=targets)
    assert all(p.requires_grad for p in model.parameters())


def test_a_model_without_such_a_part() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(AdapterError, match="no module for 'attention'"):
        resolve_targets(model, "attention")
    assert resolve_targets(model, "all-linear") == ["0"]


def test_unknown_methods_and_options_name_the_nearest() -> None:
    model = MODELS["llama"]()
    with pytest.raises(UnknownName, match="did you mean 'lora'"):
        adapters.build("loora", model)
    with pytest.raises(UnknownName, match="xlora mixes trained LoRA folders"):
        adapters.build("xlora", model)
    with pytest.raises(AdapterError, match=r"'lora_alfa' \(did you mean 'lora_alpha'\?\); it has"):
        adapters.build("lora", model, lora_alfa=3)
    with pytest.raises(AdapterError, match="r='big' is not a value of type int"):
        adapters.build("lora", model, r="big")
    assert not hasattr(model, "peft_config")


def test_names_on_one_model_are_unique_and_of_one_method() -> None:
    model = adapters.build("ssf", MODELS["llama"]())
    with pytest.raises(AdapterError, match="already has an adapter named 'default'"):
        adapters.build("ssf", model)
    before = model(batch()).logits
    with pytest.raises(AdapterError, match="different peft types"):
        adapters.build("lora", model, "other")
    assert torch.equal(model(batch()).logits, before) and list(model.peft_config) == ["default"]
    with pytest.raises(AdapterError, match="no PeftModel"):
        adapters.build("ssf", model.get_base_model(), "other")


def test_any_module_can_be_adapted_not_only_language_models() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    x = torch.randn(3, 4)
    expected = model(x)
    for name in ("lora", "parallel", "ssf", "lora_sb"):
        options: dict[str, Any] = {"target_modules": ["0"]}
        options |= {"parallel": {"bottleneck_size": 2}, "lora_sb": {"r": 2}}.get(name, {})
        torch.testing.assert_close(adapters.build(name, model, **options)(x), expected)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        expected = model(x)


@pytest.mark.parametrize("budget", [1_500, 5_000, 40_000])
@pytest.mark.parametrize("name", ["lora", "parallel", "houlsby", "lora_sb", "prompt_tuning"])
def test_a_budget_is_met_within_a_fifth(name: str, budget: int) -> None:
    model = MODELS["llama"]()
    try:
        options = adapters.fit_budget(name, model, budget)
    except AdapterError as error:
        assert name == "lora_sb" and budget > 3_584 * 1.25  # ranks end at 16
        assert "nearest: 3,584 with r=16 and 3,150 with r=15" in str(error)
        return
    counted = adapters.trainable_parameters(name, model, **options)
    assert abs(counted - budget) <= 0.2 * budget
    (size,) = options.values()
    for other in (size - 1, size + 1):
        if other >= 1:
            try:
                near = adapters.trainable_parameters(
                    name, model, **options | {next(iter(options)): other}
                )
            except AdapterError:
                continue
            assert abs(near - budget) >= abs(counted - budget), "the nearest setting is chosen"


def test_a_budget_out_of_reach_names_the_two_nearest() -> None:
    model = MODELS["llama"]()
    with pytest.raises(AdapterError, match="nearest: 1,312 with r=1 and 2,624 with r=2"):
        adapters.fit_budget("lora", model, 900)
    with pytest.raises(AdapterError, match=r"ln_tuning cannot train 900 .*nearest: 240$"):
        adapters.fit_budget("ln_tuning", model, 900)
    with pytest.raises(AdapterError, match="at least 1 weight"):
        adapters.fit_budget("lora", model, 0)
    assert adapters.fit_budget("ln_tuning", model, 250) == {}


def test_a_budget_keeps_the_other_options() -> None:
    model = MODELS["llama"]()
    options = adapters.fit_budget("lora", model, 4000, target_modules=["attention"])
    assert options.keys() == {"r", "target_modules"}
    counted = adapters.trainable_parameters("lora", model, **options)
    assert abs(counted - 4000) <= 800


def test_counting_does_not_touch_the_model() -> None:
    model = MODELS["llama"]()
    expected = model(batch()).logits
    for name in ("lora", "shira", "prefix_tuning"):
        adapters.trainable_parameters(
            name, model, **{"prefix_tuning": {}, "shira": {"r": 2}}.get(name, {})
        )
    assert torch.equal(model(batch()).logits, expected)
    assert all(p.requires_grad and not p.is_meta for p in model.parameters())
