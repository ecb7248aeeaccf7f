"""The step and the run, on a regression and on tiny language models."""

import copy
import logging
import math
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import get_scheduler

from anabranch.training.errors import DataError, Diverged, TrainingError
from anabranch.training.hooks import Hook
from anabranch.training.language import LanguageObjective
from anabranch.training.losses.causal import Causal
from anabranch.training.objective import LossOutput, Prepared
from anabranch.training.randomness import seed_all
from anabranch.training.trainer import Trainer
from tests import tiny
from tests.training.helpers import Regression, line, options, points, sequences
from tests.training.test_language import plain_loss


def trainer(count: int = 10, objective=None, model=None, more=None, **values) -> Trainer:
    return Trainer(
        model or line(),
        objective or Regression(),
        options(**values),
        points(count),
        **(more or {}),
    )


def test_learns_something_that_is_no_language_model():
    made = trainer(steps=300, more={"validation": points(5)})
    result = made.fit()
    assert result.stopped_because == "finished"
    assert result.steps == 300
    assert result.metrics["mse"] < 1e-3
    assert made.model.weight.item() == pytest.approx(2, abs=0.1)


def test_equals_a_plain_torch_loop():
    """Order of items, gradient of the mean, clipping, schedule and AdamW, over two epochs."""
    values = {"epochs": 2, "schedule": "cosine", "warmup": 2, "weight_decay": 0.1, "clip": 0.5}
    made = trainer(**values)
    drawn: list[list] = []
    plain = copy.deepcopy(made.model)

    class Spy(Hook):
        def before_step(self, trainer):
            drawn.append([])

        def after_step(self, trainer, report):
            losses.append(report.loss)

    losses: list[float] = []
    made.hooks.append(Spy())
    next_items = made.next_items
    order: list[list] = []
    made.next_items = lambda: order.append(next_items()) or order[-1]
    made.fit()

    assert [len(items) for items in order] == [4, 4, 2] * 2
    assert sorted(chain(*order[:3])) == sorted(chain(*order[3:])) == points(10)
    groups = [
        {"params": [plain.weight], "weight_decay": 0.1},
        {"params": [plain.bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=6)
    for items, reported in zip(order, losses, strict=True):
        x, y = torch.tensor(items).T
        loss = (plain(x[:, None])[:, 0] - y).square().mean()
        assert loss.item() == pytest.approx(reported, rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        scheduler.step()
    torch.testing.assert_close(made.model.weight, plain.weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(made.model.bias, plain.bias, rtol=1e-5, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12))
def test_a_step_does_not_depend_on_the_micro_batch(count, micro_batch):
    reports, weights = [], []
    for size in (10**6, micro_batch):
        made = trainer(objective=Regression(size))
        reports.append(made.step(points(count)))
        weights.append(torch.cat([p.detach().flatten() for p in made.model.parameters()]))
    assert reports[0].loss == pytest.approx(reports[1].loss, rel=1e-6)
    assert reports[0].grad_norm == pytest.approx(reports[1].grad_norm, rel=1e-5)
    torch.testing.assert_close(*weights, rtol=1e-6, atol=1e-6)


def test_one_item_and_a_batch_larger_than_the_data():
    result = trainer(count=1, epochs=3, batch=64).fit()
    assert (result.steps, result.tokens) == (3, 3)


def test_no_items():
    with pytest.raises(DataError, match=r"no items to train on \(none were given\)"):
        trainer(count=0)
    with pytest.raises(DataError, match="at least one item"):
        trainer().step([])
    with pytest.raises(DataError, match="at least one item"):
        trainer().evaluate([])


def test_what_is_dropped_is_counted_and_nothing_left_is_an_error():
    class Picky(Regression):
        def prepare(self, items):
            kept = [item for item in items if item[0] < 0.25]
            return Prepared(kept, {"too far right": len(items) - len(kept)})

    result = trainer(objective=Picky(), more={"validation": points(4)}).fit()
    assert result.dropped == {"too far right": 7, "validation: too far right": 1}
    with pytest.raises(DataError, match="no items to train on"):
        Trainer(line(), Picky(), options(), [(3.0, 1.0)])


def test_nothing_to_train():
    with pytest.raises(TrainingError, match="attach an adapter"):
        trainer(model=line().requires_grad_(False))


def test_float16_weights_are_refused():
    with pytest.raises(TrainingError, match="would lose most updates"):
        trainer(model=line().half())


class Poisoned(Regression):
    """Some steps give a loss that is not finite."""

    def __init__(self, bad: set[int]) -> None:
        super().__init__(micro_batch=10**6)
        self.bad = bad
        self.calls = 0

    def loss(self, model, micro_batch, denominators):
        output = super().loss(model, micro_batch, denominators)
        self.calls += 1
        return LossOutput(output.loss * math.nan, output.sums) if self.calls in self.bad else output


def test_a_step_that_is_not_finite_leaves_the_weights_and_is_counted(tmp_path):
    made = trainer(objective=Poisoned({2, 3, 5}), more={"output": tmp_path})
    made.step(points(4))
    before = made.state_dict()
    report = made.step(points(4))
    assert report.skipped == "the loss is nan"
    after = made.state_dict()
    assert torch.equal(before["weights"]["weight"], after["weights"]["weight"])
    moments = [state["optimizer"]["weight"]["exp_avg"] for state in (before, after)]
    assert torch.equal(*moments)
    result = made.fit()
    assert (result.skipped, result.steps) == (3, 20)
    assert torch.isfinite(made.model.weight).all()


def test_five_in_a_row_stop_the_run_and_name_the_last_good_checkpoint(tmp_path):
    made = trainer(
        objective=Poisoned({3, 6, 7, 8, 9, 10}),
        more={"output": tmp_path},
        checkpoint={"every": 1, "keep": 2},
    )
    with pytest.raises(Diverged, match=r"up to step 10 .*Last good checkpoint: .*step-5"):
        made.fit()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-4", "step-5"]


def test_an_infinite_gradient_of_a_finite_loss_is_skipped_too():
    class Cliff(Hook):
        def after_gradients(self, trainer):
            trainer.model.weight.grad.fill_(math.inf)

    made = trainer(more={"hooks": [Cliff()]})
    assert made.step(points(2)).skipped == "the gradient norm is inf"


def test_early_stopping_goes_back_to_the_best_weights():
    class Worse(Hook):
        """After step 6 the weights run away."""

        def after_step(self, trainer, report):
            if report.step > 6:
                with torch.no_grad():
                    trainer.model.weight.add_(1.0)

    made = trainer(
        steps=100,
        evaluate_every=2,
        early_stopping={"metric": "mse", "patience": 3},
        more={"validation": points(6), "hooks": [Worse()]},
    )
    result = made.fit()
    assert result.stopped_because == "early stopping"
    assert result.steps == 12
    assert result.best is not None and result.best.step == 6
    assert made.evaluate(points(6))["mse"] == pytest.approx(result.best.value)


def test_early_stopping_needs_validation_and_a_known_metric():
    with pytest.raises(TrainingError, match="needs validation items"):
        trainer(early_stopping={})
    made = trainer(early_stopping={"metric": "f1"}, more={"validation": points(2)})
    with pytest.raises(TrainingError, match="'f1', but validation gives: loss, mse"):
        made.fit()


def test_higher_may_be_better():
    values = {"metric": "mse", "patience": 1, "higher_is_better": True}
    made = trainer(
        steps=50, evaluate_every=1, early_stopping=values, more={"validation": points(6)}
    )
    result = made.fit()
    assert result.stopped_because == "early stopping"
    assert result.best is not None and result.best.step < result.steps


def test_evaluation_changes_nothing():
    model = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    runs = []
    for evaluations in (0, 3):
        made = trainer(model=copy.deepcopy(model), objective=Regression(noise=0.1))
        seed_all(0)
        found = [made.evaluate(points(5)) for _ in range(evaluations)]
        assert made.model.training
        made.step(points(6))
        runs.append(made.state_dict()["weights"]["0.weight"])
        assert all(metrics == found[0] for metrics in found), "an evaluation is repeatable"
    assert torch.equal(*runs)


def test_evaluation_does_not_depend_on_how_items_are_planned():
    made = trainer(objective=Regression(3))
    whole = trainer(objective=Regression(10**6))
    assert made.evaluate(points(200)) == pytest.approx(whole.evaluate(points(200)), rel=1e-5)


def test_moving_average_is_evaluated_and_left_in_the_model():
    made = trainer(ema=0.5, steps=3, more={"validation": points(4)})
    average = {n: p.detach().clone() for n, p in made.trainable.items()}

    class Follow(Hook):
        def after_step(self, trainer, report):
            decay = min(0.5, (1 + report.step) / (10 + report.step))
            for name, parameter in trainer.trainable.items():
                average[name] = decay * average[name] + (1 - decay) * parameter.detach()

    made.hooks.append(Follow())
    result = made.fit()
    for name, parameter in made.model.named_parameters():
        torch.testing.assert_close(parameter.detach(), average[name])
    again = trainer(model=made.model)
    assert again.evaluate(points(4)) == pytest.approx(result.metrics)


def test_hooks_are_called_in_order_and_after_the_run():
    calls = []

    class Recorder(Hook):
        def __init__(self, name):
            self.name = name

        def before_step(self, trainer):
            calls.append(f"{self.name} before")
            assert trainer.model.weight.grad is None or trainer.steps_done

        def after_gradients(self, trainer):
            calls.append(f"{self.name} gradients")

        def after_step(self, trainer, report):
            calls.append(f"{self.name} step {report.step}")

        def after_run(self, trainer):
            calls.append(f"{self.name} run")

    trainer(steps=1, more={"hooks": [Recorder("a"), Recorder("b")]}).fit()
    expected = [f"{n} {w}" for w in ("before", "gradients", "step 1", "run") for n in "ab"]
    assert calls == expected


def test_stop_ends_the_run_at_the_next_step():
    made = trainer(steps=50, more={"progress": lambda message, fraction: made.stop()})
    assert (result := made.fit()).stopped_because == "stopped"
    assert result.steps == 1
    made.progress = lambda message, fraction: None
    assert made.fit().steps == 50


def test_progress_tells_speed_and_what_is_left():
    seen = []
    trainer(steps=2, more={"progress": lambda *report: seen.append(report)}).fit()
    assert [fraction for _, fraction in seen] == [0.5, 1.0]
    assert "step 1/2" in seen[0][0] and "tokens/s" in seen[0][0] and "left" in seen[0][0]


def test_any_order_and_optimiser():
    made = trainer(
        steps=3,
        batch=2,
        more={
            "order": lambda epoch: [9, 8, 7],
            "make_optimizer": lambda named: torch.optim.Adagrad(named.values(), lr=0.5),
        },
    )
    assert made.next_items() == [points(10)[9], points(10)[8]]
    assert made.next_items() == [points(10)[7]]
    assert made.step(points(1)).lr == 0.5


def test_sgd():
    made = trainer(optimizer="sgd", momentum=0.9, clip=None, lr=0.01)
    plain = copy.deepcopy(made.model)
    made.step(points(4))
    x, y = torch.tensor(points(4)).T
    (plain(x[:, None])[:, 0] - y).square().mean().backward()
    expected = plain.weight - 0.01 * plain.weight.grad
    torch.testing.assert_close(made.model.weight, expected)


def language_trainer(items, model=None, **values):
    if model is None:
        torch.manual_seed(0)
        model = get_peft_model(tiny.llama(), LoraConfig(r=4, target_modules="all-linear"))
    made = options(**{"lr": 1e-2, **values})
    return Trainer(model, LanguageObjective.from_options(Causal(), made), made, items)


def test_a_language_model_learns():
    items = sequences(8, longest=20)
    made = language_trainer(items, steps=30, batch=8)
    before = made.evaluate(items)["loss"]
    result = made.fit()
    assert made.evaluate(items)["loss"] < before - 1.0
    assert result.tokens == 30 * sum(len(e) for (e,) in items)
    assert result.metrics["perplexity"] == pytest.approx(math.exp(result.metrics["nll"]))


def test_language_step_equals_plain_adamw():
    items = sequences(6)
    model = tiny.llama().requires_grad_(True)
    plain = copy.deepcopy(model)
    made = language_trainer(items, model, micro_batch_tokens=64, clip=None, lr=1e-3)
    report = made.step(items)
    loss = plain_loss(plain, items)
    assert report.loss == pytest.approx(loss.item(), abs=1e-6)
    loss.backward()
    squares = sum(p.grad.square().sum() for p in plain.parameters())
    assert report.grad_norm == pytest.approx(squares.sqrt().item(), rel=1e-4)
    torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0).step()
    # Adam's first step has the size of lr whatever the gradient, so rounding shows where it is 0.
    for trained, expected in zip(model.parameters(), plain.parameters(), strict=True):
        off = (trained - expected).abs() > 1e-5
        assert off.float().mean() < 0.01


def test_gradient_checkpointing_changes_nothing_but_memory():
    items = sequences(5)
    reports = [
        language_trainer(items, gradient_checkpointing=on).step(items) for on in (False, True)
    ]
    assert reports[0].loss == pytest.approx(reports[1].loss, rel=1e-6)
    assert reports[0].grad_norm == pytest.approx(reports[1].grad_norm, rel=1e-5)
    with pytest.raises(TrainingError, match="gradient_checkpointing_enable"):
        trainer(gradient_checkpointing=True)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision(precision):
    items = sequences(5)
    exact = language_trainer(items).step(items)
    made = language_trainer(items, precision=precision)
    report = made.step(items)
    for _ in range(20):  # float16 first finds its loss scale
        if not report.skipped:
            break
        assert "loss scale was lowered" in report.skipped
        report = made.step(items)
    assert report.loss == pytest.approx(exact.loss, rel=2e-2)
    assert report.grad_norm == pytest.approx(exact.grad_norm, rel=5e-2)
    assert made.skipped_in_a_row == 0
    assert all(p.dtype == torch.float32 for p in made.trainable.values())


def test_overlong_rows_of_a_run_are_counted():
    items = sequences(20, longest=40)
    long = sum(len(e) > 15 for (e,) in items)
    made = language_trainer(items, max_length=15, overlong="drop", steps=1)
    assert made.fit().dropped == {"longer than max_length": long}
    with pytest.raises(DataError, match="choose overlong"):
        language_trainer(items, max_length=15)


def test_skipped_steps_are_logged(caplog):
    made = trainer(objective=Poisoned({1}))
    with caplog.at_level(logging.WARNING):
        made.step(points(2))
    assert "step 1 skipped: the loss is nan" in caplog.text


def test_two_passes_see_the_whole_step_and_the_same_randomness():
    class Centred(Regression):
        """Needs the mean error of the step; draws noise in both passes."""

        two_pass = True

        def first_pass(self, model, micro_batch):
            drawn.append(torch.rand(()).item())
            return {"total": sum(y for _, y in micro_batch)}

        def loss(self, model, micro_batch, denominators):
            drawn.append(torch.rand(()).item())
            totals.append(denominators["total"])
            return super().loss(model, micro_batch, denominators)

    drawn: list[float] = []
    totals: list[float] = []
    trainer(objective=Centred(2)).step(points(6))
    assert totals == [pytest.approx(sum(y for _, y in points(6)))] * 3
    assert drawn[:3] == drawn[3:]
