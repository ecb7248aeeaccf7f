import pytest
import torch
from peft import LoraConfig, get_peft_model

from anabranch.training.errors import TrainingError
from anabranch.training.half import HalfFineTuning, choose_half
from anabranch.training.hooks import Hook
from anabranch.training.language import LanguageObjective
from anabranch.training.losses.causal import Causal
from anabranch.training.trainer import Trainer
from tests import tiny
from tests.training import crashing
from tests.training.helpers import options, sequences


def trainer(hooks, output=None, **values) -> Trainer:
    made = options(lr=1e-3, **values)
    return Trainer(
        tiny.llama().requires_grad_(True),
        LanguageObjective.from_options(Causal(), made),
        made,
        sequences(8),
        output=output,
        hooks=hooks,
    )


def test_the_rule():
    names = [name for name, _ in tiny.llama().named_parameters()]
    for number in range(20):
        chosen = choose_half(names, seed=3, number=number)
        assert choose_half(reversed(names), seed=3, number=number) == chosen
        ups = []
        for block in ("layers.0.", "layers.1."):
            mine = [n.split(block)[1] for n in chosen if block in n]
            assert sum("self_attn" in n for n in mine) == 2
            mlp = {n.split(".")[1] for n in mine if n.startswith("mlp")}
            assert mlp in ({"up_proj"}, {"gate_proj", "down_proj"})
            ups.append("up_proj" in mlp)
            assert sum("layernorm" in n for n in mine) == 1
        assert ups[0] != ups[1]
        assert not any("embed" in n or "lm_head" in n or n == "model.norm.weight" for n in chosen)
    rounds = {frozenset(choose_half(names, 3, number)) for number in range(20)}
    assert len(rounds) > 10
    assert choose_half(names, 4, 0) != choose_half(names, 3, 0)


def test_frozen_halves_are_bit_identical_and_lose_their_moments():
    class Watch(Hook):
        def __init__(self):
            self.start = {}

        def before_step(self, trainer):
            if trainer.sampler.position == 4:  # the first of an epoch's two steps
                self.start = {n: p.detach().clone() for n, p in trainer.trainable.items()}

        def after_step(self, trainer, report):
            chosen = choose_half(trainer.trainable, 0, trainer.epoch)
            epochs.append(trainer.epoch)
            for name, parameter in trainer.trainable.items():
                assert parameter.requires_grad == (name in chosen)
                assert (parameter in trainer.optimizer.state) == (name in chosen)
                assert torch.equal(parameter, self.start[name]) == (name not in chosen), name

    epochs: list[int] = []
    made = trainer([HalfFineTuning(0), Watch()], epochs=3, weight_decay=0.1)
    made.fit()
    assert epochs == [0, 0, 1, 1, 2, 2]
    assert all(p.requires_grad for p in made.model.parameters())


def test_rounds_by_steps_and_from_a_later_one():
    class Numbers(Hook):
        def after_step(self, trainer, report):
            found.append({n for n, p in trainer.trainable.items() if p.requires_grad})

    found: list[set[str]] = []
    made = trainer([HalfFineTuning(1, every=2, first_round=5), Numbers()], steps=4)
    made.fit()
    expected = [choose_half(made.trainable, 1, number) for number in (5, 5, 6, 6)]
    assert found == expected


def test_resumes_bit_exactly(tmp_path):
    whole = trainer([HalfFineTuning()], tmp_path / "whole", epochs=4)
    whole.fit()
    first = trainer([HalfFineTuning()], tmp_path / "parts", epochs=4)
    first.progress = lambda *_: first.stop() if first.steps_done == 3 else None
    first.fit()
    second = trainer([HalfFineTuning()], tmp_path / "parts", epochs=4)
    assert second.fit().resumed_from == 3
    assert crashing.digest(second) == crashing.digest(whole)


def test_an_adapter_has_no_halves():
    model = get_peft_model(tiny.llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(TrainingError, match=r"requires_grad_\(True\)"):
        choose_half([n for n, p in model.named_parameters() if p.requires_grad], 0, 0)
