"""Data parallelism: one process per device, each with its share of a step's items.

Without an initialised ``torch.distributed`` process group there is one rank and nothing happens.
Every rank holds all weights, draws the same items and applies the same summed gradients, so that
the ranks stay equal without exchanging weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

Item = TypeVar("Item")


def rank() -> int:
    """This process's number."""
    return dist.get_rank() if _active() else 0


def own_share(items: Sequence[Item]) -> list[Item]:
    """Every n-th item for n ranks."""
    return list(items[rank() :: dist.get_world_size()]) if _active() else list(items)


def summed(values: Mapping[str, float]) -> dict[str, float]:
    """Each value summed over ranks. A rank may lack names, if its share has none of something."""
    if not _active():
        return dict(values)
    everyone: list[Mapping[str, float]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, dict(values))
    totals: dict[str, float] = {}
    for one in everyone:
        for name, value in one.items():
            totals[name] = totals.get(name, 0.0) + value
    return totals


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace gradients by their sum over ranks, in one exchange."""
    if not _active():
        return
    trained = [p for p in parameters if p.requires_grad]
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([_gradient(p).flatten() for p in trained])
    dist.all_reduce(flat)
    start = 0
    for parameter in trained:
        _gradient(parameter).copy_(flat[start : start + parameter.numel()].view_as(parameter))
        start += parameter.numel()


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()
