"""Training state as JSON and tensors, never as pickled objects: loading one executes no code."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from anabranch.training.errors import TrainingError

TENSOR = "$tensor"
"""Key of the JSON object that stands for a tensor, stored under the name that is its value."""


def split_tensors(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """``(json, tensors)`` of nested dicts and lists; :func:`join_tensors` undoes it exactly.

    Raises :class:`TrainingError` naming the path of a value that is neither.
    """
    tensors: dict[str, Tensor] = {}

    def visit(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            tensors[path] = value.detach()
            return {TENSOR: path}
        if isinstance(value, Mapping):
            for key in value:
                if not isinstance(key, str):
                    raise TrainingError(f"state {path}: key {key!r} is not a string")
            return {key: visit(child, f"{path}/{key}") for key, child in value.items()}
        if isinstance(value, list | tuple):
            return [visit(child, f"{path}/{index}") for index, child in enumerate(value)]
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TrainingError(
            f"state {path}: a {type(value).__name__} cannot be stored; use JSON values or tensors"
        )

    return visit(tree, ""), tensors


def join_tensors(json_tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The tree from which :func:`split_tensors` made both (tuples have become lists)."""
    if isinstance(json_tree, dict):
        if set(json_tree) == {TENSOR}:
            return tensors[json_tree[TENSOR]]
        return {key: join_tensors(child, tensors) for key, child in json_tree.items()}
    if isinstance(json_tree, list):
        return [join_tensors(child, tensors) for child in json_tree]
    return json_tree


def map_tensors(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same tree with every tensor replaced."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: map_tensors(child, function) for key, child in tree.items()}
    if isinstance(tree, list | tuple):
        return [map_tensors(child, function) for child in tree]
    return tree


def differences(stored: Any, current: Any, path: str = "") -> list[str]:
    """One line for every value that differs between two JSON trees."""
    if isinstance(stored, dict) and isinstance(current, dict):
        return [
            line
            for key in sorted(stored.keys() | current.keys())
            for line in differences(
                stored.get(key), current.get(key), f"{path}.{key}" if path else key
            )
        ]
    if stored == current or (_is_nan(stored) and _is_nan(current)):
        return []
    return [f"{path}: {stored!r} in the checkpoint, {current!r} now"]


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)
