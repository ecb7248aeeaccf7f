"""Optimisers of the trainer, and their state by parameter name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from anabranch.training.errors import CheckpointError
from anabranch.training.options import TrainOptions

Parameters = Mapping[str, nn.Parameter]


def build_optimizer(
    options: TrainOptions, parameters: Parameters, stacked: bool = False
) -> Optimizer:
    """AdamW (fused where torch can) or SGD; weight decay on matrices only.

    ``stacked``: the first dimension of every parameter counts models, which are alike.
    """
    matrices = [p for p in parameters.values() if p.ndim - stacked >= 2]
    vectors = [p for p in parameters.values() if p.ndim - stacked < 2]
    groups = [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if not options.weight_decay:  # for a small model every call of a group's kernels counts
        groups = [{"params": list(parameters.values()), "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if options.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum, foreach=True)
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in matrices)
    return torch.optim.AdamW(
        groups, lr=options.lr, betas=options.betas, eps=options.eps, fused=fused or None
    )


def set_lr_factor(optimizer: Optimizer, factor: float) -> float:
    """Scale every group's own peak rate; returns the first group's rate."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
    return float(optimizer.param_groups[0]["lr"])


def optimizer_state(optimizer: Optimizer, parameters: Parameters) -> dict[str, Any]:
    """Moments by parameter name: independent of the order in which parameters are listed."""
    return {
        name: dict(optimizer.state[parameter])
        for name, parameter in parameters.items()
        if parameter in optimizer.state
    }


def load_optimizer_state(
    optimizer: Optimizer, parameters: Parameters, state: Mapping[str, Any]
) -> None:
    """Replace all moments, by copies of the given ones on their parameters' devices."""
    unknown = sorted(set(state) - set(parameters))
    if unknown:
        raise CheckpointError(f"optimiser state for unknown parameters: {', '.join(unknown[:5])}")
    optimizer.state.clear()
    for group in optimizer.param_groups:
        # Step counters are scalars. Fused and capturable kernels want them beside the parameter.
        beside = group.get("fused") or group.get("capturable")
        members = set(map(id, group["params"]))
        for name, values in state.items():
            parameter = parameters[name]
            if id(parameter) in members:
                optimizer.state[parameter] = {
                    key: _copied(value, parameter.device if beside or value.ndim else None)
                    if isinstance(value, Tensor)
                    else value
                    for key, value in values.items()
                }


def _copied(value: Tensor, device: torch.device | None) -> Tensor:
    return value.detach().clone().to(device or value.device)
