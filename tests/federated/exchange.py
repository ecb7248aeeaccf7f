"""Split learning: the client has head and tail, the server the body in between, and its graph.

Four messages a batch: activations up, body's output down, its gradient up, the input's gradient
down. Neither graph can be stored; a killed side builds it again.
"""

from __future__ import annotations

from pathlib import Path

import torch

from anabranch.federated import Client, DeviceProfile, Federation, Server, Simulation, Site, Sync
from anabranch.federated.randomness import generator

WIDTH, BATCHES = 4, 3


class BodyServer(Server):
    """Holds a frozen body W; averages the clients' heads."""

    associative = True

    def __init__(self):
        weights = generator("body").standard_normal((WIDTH, WIDTH))
        self.body = torch.from_numpy(weights) / 2
        self.head = {"head": torch.eye(WIDTH, dtype=torch.float64)}
        self.graphs = {}
        self.answers = {}

    def message(self, client, kind):
        return self.head if kind == "train" else self.answers.pop(client)

    def respond(self, reply, payload):
        if "activations" in payload:
            a = payload["activations"].requires_grad_()
            self.graphs[reply.client] = a, a @ self.body
            self.answers[reply.client] = {"output": self.graphs[reply.client][1].detach()}
            return "body"
        if "gradient" in payload:
            a, b = self.graphs.pop(reply.client)
            b.backward(payload["gradient"])
            self.answers[reply.client] = {"gradient": a.grad}
            return "back"
        return None

    @property
    def quiet(self):
        return not self.graphs and not self.answers

    def fold(self, acc, update):
        acc = acc or {"sum": torch.zeros(WIDTH, WIDTH, dtype=torch.float64), "n": 0}
        return {"sum": acc["sum"] + update.payload["head"], "n": acc["n"] + 1}

    def merge(self, one, other):
        return {key: one[key] + other[key] for key in one}

    def commit(self, acc):
        self.head = {"head": acc["sum"] / acc["n"]}

    def state_dict(self):
        return {"head": self.head}

    def load_state_dict(self, state):
        self.head = state["head"]


class HeadClient(Client):
    """Keeps its autograd graph in ``ctx.exchange`` between messages."""

    def setup(self, ctx):
        ctx.state["batches"] = 0

    def run(self, ctx, kind, payload):
        ctx.spend(1)
        memory = ctx.exchange
        if kind == "train":
            memory["head"], memory["left"] = payload["head"].clone(), BATCHES
            return self.forward(ctx), 1
        if kind == "body":
            output = payload["output"].requires_grad_()
            target = torch.from_numpy(generator("target", ctx.name).standard_normal(WIDTH))
            (output - target).square().sum().backward()
            return {"gradient": output.grad}, 1
        memory["a"].backward(payload["gradient"])
        memory["head"] = (memory["leaf"] - 0.05 * memory["leaf"].grad).detach()
        ctx.state["batches"] += 1
        memory["left"] -= 1
        if memory["left"]:
            return self.forward(ctx), 1
        head = memory["head"]
        memory.clear()
        return {"head": head}, 1

    def forward(self, ctx):
        """A batch of random inputs through the head."""
        memory = ctx.exchange
        memory["leaf"] = memory["head"].clone().requires_grad_()
        x = torch.from_numpy(ctx.rng.standard_normal((2, WIDTH)))
        memory["a"] = x @ memory["leaf"]
        return {"activations": memory["a"].detach()}


def split_learning(store: Path | None = None, clients: int = 3, faults=None) -> Federation:
    sites = [
        Site(f"c{i}", range(1), DeviceProfile(0.1 * (i + 1), 1e4, 1e4)) for i in range(clients)
    ]
    runtime = Simulation(sites, faults=faults)
    return Federation(BodyServer(), HeadClient(), Sync(4), runtime, store=store)
