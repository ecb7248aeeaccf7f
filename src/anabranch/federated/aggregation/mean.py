"""The weighted mean."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from anabranch.federated.aggregation.base import Aggregate, Combined, Rule, Tensors
from anabranch.federated.errors import EmptyRound


class Mean(Rule):
    """The mean weighted by examples (McMahan et al. 2017), or plain if all weights are the same.

    Sums are kept in float64: the product of a float32 and a count is exact there, so that one
    client's mean is its update bit for bit, and no order or tree of additions shows in float32.
    One bad update suffices to spoil it.
    """

    name = "mean"
    associative = True

    def combine(self, rows: Tensor, weights: Tensor) -> Aggregate:
        """``sum w_i u_i / sum w_i``."""
        total = weights @ rows.to(torch.float64) / weights.sum()
        return Aggregate(total.to(rows.dtype))

    def fold(self, acc: Any, tensors: Tensors, weight: float, client: str) -> Any:
        """Add ``weight * tensors`` to the sums; nothing else is kept of an update."""
        if acc is None:
            acc = {"sums": {}, "types": {}, "weight": 0.0, "removed": []}
        if not weight > 0:
            return acc
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            acc["removed"].append(client)
            return acc
        for name, tensor in tensors.items():
            product = tensor.to(torch.float64) * weight
            if name in acc["sums"]:
                acc["sums"][name] += product
            else:
                acc["sums"][name] = product
                acc["types"][name] = tensor.new_empty(0)
        acc["weight"] += weight
        return acc

    def merge(self, one: Any, other: Any) -> Any:
        """Add sums and weights."""
        sums = dict(one["sums"])
        for name, tensor in other["sums"].items():
            sums[name] = sums[name] + tensor if name in sums else tensor
        return {
            "sums": sums,
            "types": {**other["types"], **one["types"]},
            "weight": one["weight"] + other["weight"],
            "removed": one["removed"] + other["removed"],
        }

    def finish(self, acc: Any) -> Combined:
        """Divide once."""
        if acc is None or not acc["weight"] > 0 or math.isinf(acc["weight"]):
            raise EmptyRound("no finite update has a weight above 0; the model stays as it was")
        return Combined(
            {
                name: (total / acc["weight"]).to(acc["types"][name].dtype)
                for name, total in acc["sums"].items()
            },
            removed=tuple(acc["removed"]),
        )
