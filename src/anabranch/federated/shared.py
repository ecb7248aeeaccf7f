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
    _fill(dict(model.named_buffers()) | dict(model.named_parameters()), tensors)


@contextmanager
def lent(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """The model holds these values meanwhile, and is as it was afterwards, whatever happens.

    Buffers, such as running means of a BatchNorm, are put back, too: one site's never reach the
    next.
    """
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    changing = [*buffers.values(), *(p for name, p in parameters.items() if name in tensors)]
    before = [(tensor, tensor.detach().clone()) for tensor in changing]
    modes = [(module, module.training) for module in model.modules()]
    _fill(buffers | parameters, tensors)
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)
        for module, training in modes:
            module.training = training


def _fill(places: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if name not in places or places[name].shape != tensor.shape:
            there = list(places[name].shape) if name in places else "absent"
            raise FederationError(
                f"{name} is {list(tensor.shape)} in the message, and {there} in the model here"
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            places[name].copy_(tensor)


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
