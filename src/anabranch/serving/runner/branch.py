"""Further copies of a served model's modules, on the same weights."""

from __future__ import annotations

import copy

from torch import Tensor, nn
from transformers import PreTrainedModel

from anabranch.serving.runner.frozen import FrozenLinear


def branch_of(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the modules that shares the memory of every weight."""
    shared: dict[int, Tensor] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        # A parameter of its own: some methods of PEFT replace what a base layer's one holds.
        shared[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    return copy.deepcopy(model, shared)


def freeze_linears(model: nn.Module) -> None:
    """Replace every plain ``nn.Linear`` by a :class:`FrozenLinear` around its weight, in place."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, FrozenLinear.of(child))
