"""The federation of ``python -m benchmarks.federated`` as a Flower app; runs in its environment.

    python flower_driver.py JOB.npz ROUNDS LOCAL_STEPS CORES

Prints the time at which each round ended and the accuracy after the last, as JSON. Local training
is a plain torch loop.
"""

from __future__ import annotations

import json
import os
import sys
import time

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import numpy as np
import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import nn

JOB, ROUNDS, STEPS, CORES = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
BATCH, RATE = 16, 0.1


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


class Job:
    """The data, read once in each worker process."""

    loaded = None

    @classmethod
    def get(cls):
        if cls.loaded is None:
            torch.set_num_threads(1)
            data = np.load(JOB)
            cls.loaded = {name: torch.from_numpy(data[name]) for name in data.files}
        return cls.loaded


client_app = ClientApp()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    job = Job.get()
    own = job["indices"][job["owners"] == context.node_config["partition-id"]]
    model = perceptron()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for _ in range(STEPS):
        batch = own[torch.randperm(len(own))[:BATCH]]
        optimizer.zero_grad()
        F.cross_entropy(model(job["pixels"][batch]), job["labels"][batch]).backward()
        optimizer.step()
    content = RecordDict(
        {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord({"num-examples": len(own)}),
        }
    )
    return Message(content=content, reply_to=message)


class Counting(FedAvg):
    """Knows how many clients were averaged in each round: a failed one is left out silently."""

    averaged: list[int] = []

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        self.averaged.append(sum(not reply.has_error() for reply in replies))
        return super().aggregate_train(server_round, replies)


server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    ended: list[float] = []
    accuracy = 0.0
    job = Job.get()

    def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord:
        nonlocal accuracy
        ended.append(time.perf_counter())
        if number == ROUNDS:
            model = perceptron()
            model.load_state_dict(arrays.to_torch_state_dict())
            right = model(job["test_pixels"]).argmax(1) == job["test_labels"]
            accuracy = float(right.double().mean())
        return MetricRecord({"round": number})

    strategy = Counting(fraction_evaluate=0.0)
    strategy.start(grid, ArrayRecord(perceptron().state_dict()), ROUNDS, evaluate_fn=evaluate)
    found = {"ended": ended, "accuracy": accuracy, "averaged": strategy.averaged}
    print("RESULT " + json.dumps(found), flush=True)


if __name__ == "__main__":
    clients = int(Job.get()["owners"].max()) + 1
    run_simulation(
        server_app,
        client_app,
        clients,
        backend_config={
            "init_args": {"num_cpus": CORES, "include_dashboard": False},
            "client_resources": {"num_cpus": 1, "num_gpus": 0},
        },
    )
