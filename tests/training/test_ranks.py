"""Two processes train as one."""

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing

from anabranch.training import ranks
from anabranch.training.trainer import Trainer
from tests.training.helpers import Regression, line, options, points


def train(output=None, micro_batch=2):
    made = Trainer(
        line(),
        Regression(micro_batch),
        options(steps=6, batch=5, checkpoint={"every": 3}),
        points(7),
        validation=points(3),
        output=output,
    )
    result = made.fit()
    weights = torch.cat([p.detach().flatten() for p in made.model.parameters()])
    return weights, result.metrics


def one_rank(rank, world, folder):
    store = dist.FileStore(str(folder / "rendezvous"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    try:
        torch.save(train(folder / "run"), folder / f"rank-{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path):
    """Seven items in batches of five and two: shares of three, two and one."""
    multiprocessing.start_processes(one_rank, (2, tmp_path), nprocs=2, start_method="spawn")
    found = [torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(2)]
    expected, metrics = train()
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][0], expected, rtol=1e-5, atol=1e-6)
    assert found[0][1] == found[1][1] == pytest.approx(metrics, rel=1e-4)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert sum('"grad_norm"' in line for line in lines) == 6, "one rank writes the log"


def test_without_a_process_group_there_is_one_rank():
    assert ranks.rank() == 0
    assert ranks.own_share([1, 2]) == [1, 2]
    assert ranks.summed({"a": 1.0}) == {"a": 1.0}
