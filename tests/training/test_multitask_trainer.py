"""The multi-task loss and its balancers inside the trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from anabranch.evaluation.byte_tasks import TASKS, rows
from anabranch.evaluation.tiny_models import tiny_llama
from anabranch.training.language import LanguageObjective
from anabranch.training.losses.multitask import MultiTaskLoss
from anabranch.training.options import TrainOptions
from anabranch.training.trainer import Trainer

TRAIN = [item for task in TASKS for item in rows(task, 12, seed=1)]
VALID = [item for task in TASKS for item in rows(task, 3, seed=2)]
COBA = {"name": "coba", "warmup": 2, "window": 4}


def trainer(loss: MultiTaskLoss, tokens: int = 4096, **options: Any) -> Trainer[Any]:
    chosen = TrainOptions(
        steps=8, batch=6, lr=1e-2, precision="fp32", micro_batch_tokens=tokens, **options
    )
    model = tiny_llama(layers=1, width=32)
    objective = LanguageObjective.from_options(loss, chosen)
    return Trainer(model, objective, chosen, TRAIN, VALID, hooks=loss.hooks(TRAIN, VALID))


@pytest.mark.parametrize(
    "options",
    [
        {"normalise": "token"},
        {"normalise": "task-token"},
        {"normalise": "task-sample", "focal": "sample"},
        {"normalise": "task-sample", "focal": "task"},
    ],
    ids=str,
)
def test_a_step_is_the_same_in_one_micro_batch_and_in_many(options: dict[str, Any]) -> None:
    reports, weights = [], []
    for tokens in (4096, 48):
        one = trainer(MultiTaskLoss(**options), tokens)
        reports.append(one.step(TRAIN[::3]))
        weights.append(torch.cat([p.detach().flatten() for p in one.model.parameters()]))
    assert len(one.objective.plan(TRAIN[::3])) > 2
    assert reports[0].loss == pytest.approx(reports[1].loss, abs=1e-5)
    assert reports[0].grad_norm == pytest.approx(reports[1].grad_norm, rel=1e-4)
    assert reports[0].metrics == pytest.approx(dict(reports[1].metrics), abs=1e-4)


@pytest.mark.parametrize("balancer", [COBA, {"name": "selfpaced", "window": 4}], ids=str)
def test_a_resumed_run_gives_the_same_weights_to_tasks_and_model(balancer: dict[str, Any]) -> None:
    def weights_of(report: Any) -> dict[str, float]:
        return {k: v for k, v in report.metrics.items() if k.startswith("weight/")}

    whole = trainer(MultiTaskLoss(balancer=balancer, valid_batch=4))
    sequence = [weights_of(whole.step(whole.next_items())) for _ in range(4)]
    state = whole.state_dict()
    sequence += [weights_of(whole.step(whole.next_items())) for _ in range(4)]
    assert sequence[-1] != sequence[0]

    resumed = trainer(MultiTaskLoss(balancer=balancer, valid_batch=4))
    resumed.load_state_dict(state)
    again = [weights_of(resumed.step(resumed.next_items())) for _ in range(4)]
    assert again == sequence[4:]
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_an_evaluation_reports_each_task() -> None:
    one = trainer(MultiTaskLoss(balancer="uniform"))
    metrics = one.evaluate(VALID)
    assert {f"loss/{task}" for task in TASKS} <= set(metrics)
    terms = [metrics[f"weight/{task}"] * metrics[f"loss/{task}"] for task in TASKS]
    assert metrics["loss"] == pytest.approx(sum(terms), abs=1e-5)
    only = one.evaluate([item for item in VALID if item[0].task == "copy"])
    assert "loss/add" not in only and only["present/add"] == 0
