"""Nested state as bytes: what clients and the coordinator store.

Nested dicts (with text keys) and lists of tensors, bytes and JSON values. Loading executes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from anabranch.federated import payload as encoding
from anabranch.federated.errors import PayloadError
from anabranch.federated.payload import Value

_TREE = "tree"
_LEAF = "$"
"""Key of the object that stands for a tensor or bytes; its value is where they are."""


def dump(tree: Any) -> bytes:
    """Bytes of a tree; :class:`PayloadError` naming the path of a value that has no place in one.

    Tuples come back as lists.
    """
    leaves: dict[str, Value] = {}
    shared: dict[int, str] = {}

    def visit(value: Any, path: str) -> Any:
        if isinstance(value, Tensor | bytes):
            # The same message for a hundred clients is stored once.
            if id(value) not in shared:
                shared[id(value)] = str(len(leaves))
                leaves[shared[id(value)]] = value
            return {_LEAF: shared[id(value)]}
        if isinstance(value, Mapping):
            for key in value:
                if not isinstance(key, str) or key == _LEAF:
                    raise PayloadError(f"state {path or '/'}: {key!r} cannot be a key")
            return {key: visit(child, f"{path}/{key}") for key, child in value.items()}
        if isinstance(value, list | tuple):
            return [visit(child, f"{path}/{index}") for index, child in enumerate(value)]
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise PayloadError(
            f"state {path or '/'}: a {type(value).__name__} cannot be stored; use tensors, bytes "
            f"and JSON values"
        )

    text = json.dumps(visit(tree, ""), separators=(",", ":"))
    return encoding.encode({**leaves, _TREE: text})


def load(data: bytes) -> Any:
    """The tree of these bytes."""
    leaves = encoding.decode(data)
    if not isinstance(text := leaves.pop(_TREE, None), str):
        raise PayloadError("the payload is no tree")

    def visit(value: Any) -> Any:
        if isinstance(value, dict):
            if set(value) == {_LEAF}:
                return leaves[value[_LEAF]]
            return {key: visit(child) for key, child in value.items()}
        return [visit(child) for child in value] if isinstance(value, list) else value

    try:
        return visit(json.loads(text))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise PayloadError(f"the tree is damaged: {error}") from None


def plain(tree: Any) -> Any:
    """The tree as it is after :func:`load`, tensors aside: tuples are lists."""
    if isinstance(tree, Mapping):
        return {key: plain(child) for key, child in tree.items()}
    return [plain(child) for child in tree] if isinstance(tree, list | tuple) else tree
