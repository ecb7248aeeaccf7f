"""Leaves a network as it was when changing it fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Undo replaced modules, attributes and weights of ``model`` if the block raises.

    Weights are remembered by reference, not copied: replacing a tensor is undone, writing into one
    is not. PEFT's merge with ``safe_merge`` and ours only replace.
    """
    before = [(module, _contents(module)) for module in model.modules()]
    tensors = [(p, p.data, p.requires_grad) for p in model.parameters()]
    try:
        yield
    except BaseException:
        for module, contents in before:
            module.__dict__.clear()
            module.__dict__.update(contents)
        for parameter, data, requires_grad in tensors:
            parameter.data = data
            parameter.requires_grad_(requires_grad)
        raise


def _contents(module: nn.Module) -> dict[str, Any]:
    """A module's attributes; its dicts and lists (children, hooks, adapter names) copied."""
    return {
        name: type(value)(value) if type(value) in (dict, list, set) else value
        for name, value in module.__dict__.items()
    }
