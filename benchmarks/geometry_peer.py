"""A peer's network on charged particles, in an environment of its own (``benchmarks.geometry``).

    python benchmarks/geometry_peer.py PEER DATA SECONDS BATCH RATE

``DATA`` is an ``.npz`` with ``charges`` [systems, particles], ``positions``, ``velocities`` and
``targets`` [systems, particles, 3], and the same with ``test_`` before the name. Knows nothing of
Anabranch. Neither library has a network for this task: the layers are theirs, how they are put
together is ours.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

WARM_UP = 2


def egnn_pytorch() -> nn.Module:
    """Four layers of 64 channels. They know no velocities: x + phi(h) v follows each."""
    from egnn_pytorch import EGNN

    class Network(nn.Module):
        def __init__(self, width: int = 64, layers: int = 4) -> None:
            super().__init__()
            self.start = nn.Linear(2, width)
            self.layers = nn.ModuleList(
                EGNN(width, edge_dim=1, m_dim=width, norm_feats=True, norm_coors=True)
                for _ in range(layers)
            )
            self.along = nn.ModuleList(
                nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))
                for _ in range(layers)
            )

        def forward(self, charges: Tensor, x: Tensor, v: Tensor) -> Tensor:
            h = self.start(torch.stack([charges, v.norm(dim=-1)], dim=-1))
            edges = (charges[:, :, None] * charges[:, None, :]).unsqueeze(-1)
            for layer, along in zip(self.layers, self.along, strict=True):
                h, x = layer(h, x, edges=edges)
                x = x + along(h) * v
            return x

    return Network()


def e3nn() -> nn.Module:
    """Three layers of tensor products with spherical harmonics of degree 0 and 1, and gates.

    16 scalars and 16 vectors a particle; weights of the products come from distance and charges.
    """
    from e3nn import o3
    from e3nn.nn import FullyConnectedNet, Gate

    class Layer(nn.Module):
        def __init__(self, width: int, inner: Any, harmonics: Any) -> None:
            super().__init__()
            scalars, vectors = f"{width}x0e", f"{width}x1o"
            self.gate = Gate(scalars, [torch.nn.functional.silu], scalars, [torch.sigmoid], vectors)
            into = self.gate.irreps_in
            self.product = o3.FullyConnectedTensorProduct(
                inner, harmonics, into, shared_weights=False
            )
            self.weights = FullyConnectedNet(
                [2, 32, self.product.weight_numel], torch.nn.functional.silu
            )
            self.own = o3.Linear(inner, into)

        def forward(self, h: Tensor, edges: Any, harmonics: Tensor, pair: Tensor) -> Tensor:
            senders, receivers = edges
            messages = self.product(h[senders], harmonics, self.weights(pair))
            total = torch.zeros(len(h), messages.shape[1]).index_add(0, receivers, messages)
            return h + self.gate(self.own(h) + total / 2)  # four neighbours

    class Network(nn.Module):
        def __init__(self, width: int = 16, layers: int = 3) -> None:
            super().__init__()
            self.harmonics = o3.Irreps.spherical_harmonics(1)
            inner = o3.Irreps(f"{width}x0e + {width}x1o")
            self.start = o3.Linear("2x0e + 1x1o", inner)
            self.layers = nn.ModuleList(Layer(width, inner, self.harmonics) for _ in range(layers))
            self.end = o3.Linear(inner, "1x1o")

        def forward(self, charges: Tensor, x: Tensor, v: Tensor) -> Tensor:
            systems, count = charges.shape
            pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
            within = torch.tensor(pairs).T  # [2, pairs]
            first = torch.arange(systems)[:, None, None] * count
            senders, receivers = (first + within).permute(1, 0, 2).reshape(2, -1)
            q, at, speed = charges.reshape(-1), x.reshape(-1, 3), v.reshape(-1, 3)
            apart = at[senders] - at[receivers]
            distance = apart.norm(dim=-1)
            harmonics = o3.spherical_harmonics(
                self.harmonics, apart, normalize=True, normalization="component"
            )
            # Bounded: some particles fly far away.
            pair = torch.stack([1 / (1 + distance), q[senders] * q[receivers]], dim=-1)
            features = [torch.stack([q, speed.norm(dim=-1)], dim=-1), speed]
            h = self.start(torch.cat(features, dim=-1))
            for layer in self.layers:
                h = layer(h, (senders, receivers), harmonics, pair)
            return x + self.end(h).view_as(x)

    return Network()


def main() -> None:
    peer, path, *numbers = sys.argv[1:]
    seconds, batch, rate = map(float, numbers)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with np.load(path) as file:
        data = {name: torch.from_numpy(file[name]) for name in file.files}
    model = {"egnn-pytorch": egnn_pytorch, "e3nn": e3nn}[peer]()
    costs = train(model, data, seconds, int(batch), rate)
    with torch.no_grad():
        kinds = ("charges", "positions", "velocities")
        parts = zip(*(data[f"test_{kind}"].split(200) for kind in kinds), strict=True)
        found = torch.cat([model(*part) for part in parts])
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "milliseconds_a_step": statistics.median(costs[WARM_UP:]) * 1e3,
        "steps": len(costs),
        "mse": float((found - data["test_targets"]).square().mean()),
    }
    print(json.dumps(facts))


def train(
    model: nn.Module, data: dict[str, Tensor], seconds: float, batch: int, rate: float
) -> list[float]:
    """Adam with a cosine to zero on randomly turned systems; processor seconds of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-10, fused=True)
    count = len(data["charges"])
    costs: list[float] = []
    order = torch.randperm(count)
    while (spent := sum(costs)) < seconds:
        began = time.process_time()
        if len(order) < batch:
            order = torch.randperm(count)
        rows, order = order[:batch], order[batch:]
        turns, _ = torch.linalg.qr(torch.randn(len(rows), 3, 3))
        kinds = ("positions", "velocities", "targets")
        x, v, y = (data[kind][rows] @ turns for kind in kinds)
        for group in optimizer.param_groups:
            group["lr"] = rate * 0.5 * (1 + np.cos(np.pi * min(1.0, spent / seconds)))
        loss = (model(data["charges"][rows], x, v) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        costs.append(time.process_time() - began)
    return costs


if __name__ == "__main__":
    main()
