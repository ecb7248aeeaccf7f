"""What of a model is shared: the parameters that are trained. Base weights are never sent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from anabranch.federated.errors import FederationError
from anabranch.federated.payload import Payload


def shared_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters that require gradients, by name."""
    found = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise FederationError(
            "the model has nothing to share: no parameter requires gradients; attach an adapter, "
            "or call requires_grad_(True) to share all weights"
        )
    return found


def load_shared(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put values into the parameters and buffers of these names, which must all be there."""
    parameters: dict[str, Tensor] = {
        **dict(model.named_buffers()),
        **dict(model.named_parameters()),
    }
    for name, tensor in tensors.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            there = list(parameters[name].shape) if name in parameters else "absent"
            raise FederationError(
                f"{name} is {list(tensor.shape)} in the message, and {there} in the model here"
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)


@contextmanager
def lent(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """The model holds these values meanwhile, and is as it was afterwards, whatever happens.

    Buffers, such as running means of a BatchNorm, are put back, too: one site's never reach the
    next.
    """
    before = {n: p.detach().clone() for n, p in model.named_parameters() if n in tensors}
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    modes = [(module, module.training) for module in model.modules()]
    load_shared(model, tensors)
    try:
        yield
    finally:
        load_shared(model, before)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for module, training in modes:
            module.training = training


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Everything trains meanwhile, but BatchNorms use their running means and leave them alone.

    Gradients at two points then differ by the points only.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    freeze_statistics(model)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def freeze_statistics(model: nn.Module) -> None:
    """Put all BatchNorms into evaluation mode."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def tensors_of(payload: Payload) -> dict[str, Tensor]:
    """The tensors of a payload."""
    return {name: value for name, value in payload.items() if isinstance(value, Tensor)}
