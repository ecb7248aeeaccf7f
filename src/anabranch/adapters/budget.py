"""Choosing a method's size by the number of weights it may train."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from anabranch.adapters.catalogue import method, skeleton, trainable_parameters
from anabranch.adapters.errors import AdapterError

TOLERANCE = 0.2
"""How far from the budget a setting may be."""
LARGEST = 1 << 24


def fit_budget(name: str, model: nn.Module, parameters: int, **options: Any) -> dict[str, Any]:
    """Options with which a method trains about ``parameters`` weights of this model.

    The size is searched, ``options`` are kept. The nearest setting is taken; if it is more than
    20 % off, :class:`AdapterError` names the two nearest. The model is not touched.
    """
    if parameters < 1:
        raise AdapterError(f"a budget is at least 1 weight, not {parameters}")
    info = method(name)
    shapes = skeleton(model) if info.on_meta else model
    refusals: list[AdapterError] = []

    def counted(value: float | None) -> int | None:
        size = {} if value is None or info.size is None else {info.size.option: value}
        try:
            return trainable_parameters(name, shapes, **{**options, **size})
        except AdapterError as error:
            refusals.append(error)  # the method or the model does not allow this size
            return None

    if info.size is None or info.size.option in options:
        found: dict[Any, int | None] = {None: counted(None)}
    elif info.size.values is None:
        found = _search(counted, parameters)
    else:
        found = {value: counted(value) for value in info.size.values}
    counts = {value: n for value, n in found.items() if n is not None}
    if not counts:
        raise refusals[-1]
    nearest = sorted(counts, key=lambda value: abs(counts[value] - parameters))
    best = nearest[0]
    if abs(counts[best] - parameters) > TOLERANCE * parameters:
        settings = [
            f"{counts[value]:,}"
            + (f" with {info.size.option}={value}" if info.size and value is not None else "")
            for value in nearest[:2]
        ]
        raise AdapterError(
            f"{name} cannot train {parameters:,} weights of this model within "
            f"{TOLERANCE:.0%}; nearest: {' and '.join(settings)}"
        )
    if best is None or info.size is None:
        return dict(options)
    return {**options, info.size.option: best}


def _search(counted: Callable[[float | None], int | None], wanted: int) -> dict[Any, Any]:
    """Counts of sizes around the wanted one: doubling, then bisection."""
    found: dict[Any, Any] = {}

    def at(value: int) -> int | None:
        if value not in found:
            found[value] = counted(value)
        return found[value]

    def reaches(value: int) -> bool:
        n = at(value)
        # A size that cannot be built after one that could is too large.
        return n >= wanted if n is not None else any(v < value for v in _built(found))

    high = 1
    while not reaches(high) and high < LARGEST:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        if reaches(middle):
            high = middle
        else:
            low = middle
    best = min(_built(found), key=lambda v: abs(found[v] - wanted), default=1)
    for neighbour in (best - 1, best + 1):
        if neighbour >= 1:
            at(neighbour)
    return found


def _built(found: dict[Any, Any]) -> Iterable[int]:
    return [value for value, n in found.items() if n is not None]
