"""Packing, the head on trained rows, and the two routes: all against the plain computation."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, MistralConfig

from anabranch.training import forward
from anabranch.training import sequences as grids
from anabranch.training.errors import DataError, TrainingError
from anabranch.training.example import Example
from anabranch.training.language import LanguageObjective
from anabranch.training.losses.causal import Causal
from anabranch.training.packing import FORWARD_COST, plan_layouts
from tests import tiny
from tests.training.helpers import example, pairs, sequences

PACK = FORWARD_COST["cuda"]
"""So that packing is worth it even for the few tokens of a test."""


def plain_nll(model, made: Example) -> torch.Tensor:
    """Losses of one sequence's trained tokens, through the model's own forward."""
    logits = model(input_ids=torch.tensor([made.tokens])).logits[0].float()
    losses = F.cross_entropy(logits[:-1], torch.tensor(made.tokens[1:]), reduction="none")
    return losses[torch.tensor(made.trained[1:])]


def plain_loss(model, items) -> torch.Tensor:
    return torch.cat([plain_nll(model, e) for item in items for e in item]).mean()


def gradients(model) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def step_gradients(model, objective, items):
    """Loss and gradients of a step, as the trainer accumulates them; packed if it may be."""
    objective.check(model)
    objective.forward_cost = PACK
    model.zero_grad()
    denominators = objective.denominators(items)
    total = 0.0
    for micro_batch in objective.plan(items):
        output = objective.loss(model, micro_batch, denominators)
        output.loss.backward()
        total += output.loss.item()
    return total, gradients(model)


def assert_same_step(model, objective, items):
    model.zero_grad()
    expected = plain_loss(model, items)
    expected.backward()
    wanted = gradients(model)
    loss, found = step_gradients(model, objective, items)
    assert loss == pytest.approx(expected.item(), abs=1e-6)
    assert wanted.keys() == found.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("packing", ["none", "bfd"])
@pytest.mark.parametrize("budget", [64, 200, 4096])
@pytest.mark.parametrize("trained", ["all", "adapter"])
def test_a_step_equals_plain_autograd(packing, budget, trained):
    model = tiny.llama()
    if trained == "adapter":
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(model, config)
    objective = LanguageObjective(Causal(), packing=packing, micro_batch_tokens=budget)
    assert_same_step(model, objective, sequences(12))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.integers(40, 300), st.sampled_from(["none", "bfd"]))
def test_any_split_gives_the_same_gradient(seed, budget, packing):
    model = tiny.llama()
    items = sequences(random.Random(seed).randint(1, 12), seed)
    whole = LanguageObjective(Causal(), packing="none", micro_batch_tokens=10**6)
    split = LanguageObjective(Causal(), packing=packing, micro_batch_tokens=budget)
    loss, wanted = step_gradients(model, whole, items)
    split_loss, found = step_gradients(model, split, items)
    assert split_loss == pytest.approx(loss, rel=1e-6)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_losses_equal_unpacked(attention):
    model = tiny.llama()
    model.set_attn_implementation(attention)
    items = sequences(9)
    (layout,) = plan_layouts([[len(item[0])] for item in items], 10**6, "bfd", PACK)
    assert layout.packed
    batch = grids.build(items, layout, 0, torch.device("cpu"))
    with torch.no_grad():
        expected = torch.cat([plain_nll(model, item[0]) for item in items])
        torch.testing.assert_close(forward.nll(model, batch, "body"), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(forward.nll(model, batch, "whole"), expected, rtol=0, atol=1e-5)


def test_a_sequence_does_not_see_its_neighbours():
    model = tiny.llama()
    generator = random.Random(0)
    kept, third, one, other = (example(n, generator) for n in (12, 9, 20, 20))
    device = torch.device("cpu")
    with torch.no_grad():
        (layout,) = plan_layouts([[20], [12], [9]], 64, "bfd", PACK)
        assert layout.packed
        found = [
            forward.nll(model, grids.build([(n,), (kept,), (third,)], layout, 0, device), "body")[
                n.targets :
            ]
            for n in (one, other)
        ]
    assert torch.equal(*found)


def test_a_model_that_ignores_the_mask_is_refused():
    model = tiny.llama()
    inner = model.model.forward
    # Without the mask transformers would separate sequences by their positions.
    model.model.forward = lambda attention_mask=None, position_ids=None, **rest: inner(**rest)
    with pytest.raises(TrainingError, match=r"see each other.*packing: none"):
        LanguageObjective(Causal()).check(model)
    LanguageObjective(Causal(), packing="none").check(model)


def test_attention_without_block_masks_is_refused():
    model = tiny.llama()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(TrainingError, match="sdpa"):
        LanguageObjective(Causal()).check(model)


def test_something_that_is_no_language_model_is_refused():
    with pytest.raises(TrainingError, match="no transformers language model"):
        LanguageObjective(Causal()).check(torch.nn.Linear(2, 2))


def tiny_config(kind: str, **more):
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[kind](
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=tiny.VOCABULARY,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.2,
        **more,
    )


ARCHITECTURES = {
    "qwen2": {},
    "gemma2": {"head_dim": 8, "sliding_window": 6, "final_logit_softcapping": 5.0},
    "gemma3_text": {"head_dim": 8, "sliding_window": 6},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
    "mistral": {"sliding_window": 6},
}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_architectures(kind):
    """Caps and scales of the head, sliding windows shorter than the sequences."""
    torch.manual_seed(0)
    config = tiny_config(kind, **ARCHITECTURES[kind])
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    objective = LanguageObjective(Causal())
    objective.check(model)
    assert objective._route == "body"
    assert_same_step(model, objective, sequences(6))


def test_a_window_of_one_mask_model_is_kept_when_packing():
    model = AutoModelForCausalLM.from_config(
        tiny_config("mistral", sliding_window=4), attn_implementation="sdpa"
    ).eval()
    assert isinstance(model.config, MistralConfig)
    assert_same_step(model, LanguageObjective(Causal()), sequences(5, longest=20))


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_adapters_in_the_models_own_forward(config):
    model = get_peft_model(tiny.llama(), config(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(TrainingError, match="packing: none"):
        LanguageObjective(Causal()).check(model)
    objective = LanguageObjective(Causal(), packing="none")
    objective.check(model)
    assert objective._route == "whole"
    model.eval()
    items = sequences(4)
    with torch.no_grad():
        expected = []
        for (made,) in items:
            logits = model(input_ids=torch.tensor([made.tokens])).logits[0, -len(made) :].float()
            losses = F.cross_entropy(logits[:-1], torch.tensor(made.tokens[1:]), reduction="none")
            expected.append(losses[torch.tensor(made.trained[1:])])
    loss, _ = step_gradients(model, objective, items)
    assert loss == pytest.approx(torch.cat(expected).mean().item(), abs=1e-5)


def test_a_trained_head_gets_its_gradient():
    model = tiny.llama().requires_grad_(False)
    model.lm_head.requires_grad_(True)
    assert_same_step(model, LanguageObjective(Causal()), sequences(5))


def test_a_step_with_an_untrained_row_is_refused():
    objective = LanguageObjective(Causal())
    with pytest.raises(DataError, match="a:3 has no token to train on"):
        objective.plan([(Example([1, 2], [False, False], source="a:3"),)])


def test_reference_scores_are_those_of_the_base():
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.5)
    model = get_peft_model(tiny.llama(), config).train()
    frozen = next(p for p in model.parameters() if p.requires_grad).requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    objective = LanguageObjective(Causal())
    objective.check(model)
    items = pairs(3)
    (micro_batch,) = objective.plan(items)
    batch = grids.build(items, micro_batch.layout, 0, torch.device("cpu"))
    found = objective._reference_nll(model, batch)
    base = tiny.llama()
    with torch.no_grad():
        expected = torch.cat([plain_nll(base, e) for item in items for e in item])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not frozen.requires_grad
    assert model.training


def test_fingerprint_sees_tokens_and_marks():
    objective = LanguageObjective(Causal())
    one = [(Example([1, 2, 3], [False, True, True]),)]
    marks = [(Example([1, 2, 3], [False, False, True]),)]
    tokens = [(Example([1, 2, 4], [False, True, True]),)]
    digests = {objective.fingerprint(items) for items in (one, marks, tokens, one * 2)}
    assert len(digests) == 4
    assert objective.fingerprint(one) == objective.fingerprint(list(one))
