import pytest
import torch
from transformers import get_scheduler

from anabranch.training.schedules import lr_factor


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_equal_to_transformers(schedule, warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=30)
    for step in range(30):
        assert lr_factor(step, 30, warmup, schedule) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ends_at_the_floor_and_stays(schedule):
    assert lr_factor(30, 30, 3, schedule, 0.1) == pytest.approx(0.1)
    assert lr_factor(99, 30, 3, schedule, 0.1) == pytest.approx(0.1)
    assert lr_factor(3, 30, 3, schedule, 0.1) == 1.0


def test_one_step():
    assert lr_factor(0, 1, 0, "cosine") == 1.0
