"""Rows that cannot be trained on as they are: too long, or without a token to train on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from anabranch.training.errors import DataError
from anabranch.training.example import Example, Item
from anabranch.training.objective import Prepared

Overlong = Literal["error", "drop", "truncate", "split"]
Untrained = Literal["error", "drop"]

NAMED = 5
"""How many rows an error names."""


@dataclass(frozen=True)
class RowPolicy:
    """Limits of a row and what becomes of one that breaks them.

    ``drop`` leaves the item out, ``truncate`` keeps the first ``max_length`` tokens of each
    example, ``split`` cuts an item of one example into pieces that overlap by one token, so that
    every trained token is still predicted once. ``max_item_tokens`` bounds all examples of an item
    together, which share a forward pass.
    """

    max_length: int | None = None
    overlong: Overlong = "error"
    untrained: Untrained = "error"
    max_item_tokens: int | None = None


def filter_rows(items: Sequence[Item], policy: RowPolicy) -> Prepared[Item]:
    """Apply a policy. Raises :class:`DataError` with the number and the first rows concerned."""
    dropped: Counter[str] = Counter()
    fitting = [fit for item in items for fit in _fit(item, policy, dropped)]
    too_long = [item for item in fitting if _too_long(item, policy)]
    if too_long:
        limit = policy.max_length
        raise DataError(
            f"{_rows(too_long)} longer than max_length ({limit} tokens; the longest has "
            f"{max(len(e) for item in too_long for e in item)}); raise max_length, or choose "
            f"overlong: drop, truncate or split"
        )
    trained = [item for item in fitting if all(any(e.trained) for e in item)]
    if len(trained) < len(fitting):
        if policy.untrained == "error":
            empty = [item for item in fitting if not all(any(e.trained) for e in item)]
            raise DataError(
                f"{_rows(empty)} without a token to train on: every token is masked"
                f"{' in its first ' + str(policy.max_length) if dropped['truncated'] else ''}; "
                f"check the template and max_length, or choose untrained: drop"
            )
        dropped["no token to train on"] += len(fitting) - len(trained)
    _require_room(trained, policy.max_item_tokens)
    return Prepared(trained, {reason: count for reason, count in dropped.items() if count})


def _fit(item: Item, policy: RowPolicy, dropped: Counter[str]) -> Iterator[Item]:
    if not _too_long(item, policy) or policy.overlong == "error":
        yield item
        return
    assert policy.max_length is not None
    if policy.overlong == "drop":
        dropped["longer than max_length"] += 1
    elif policy.overlong == "truncate":
        dropped["truncated"] += 1
        yield tuple(_cut(example, 0, policy.max_length) for example in item)
    else:
        yield from _split(item, policy.max_length, dropped)


def _split(item: Item, length: int, dropped: Counter[str]) -> Iterator[Item]:
    if len(item) > 1:
        raise DataError(
            f"{_rows([item])} longer than max_length, but its examples are compared as wholes and "
            f"cannot be split; choose overlong: drop or truncate"
        )
    if length < 2:
        raise DataError("overlong: split needs a max_length of at least 2 tokens")
    (example,) = item
    dropped["split"] += 1
    for start in range(0, len(example) - 1, length - 1):
        piece = _cut(example, start, start + length)
        if any(piece.trained):
            yield (piece,)
        else:
            dropped["pieces without a token to train on"] += 1


def _cut(example: Example, start: int, stop: int) -> Example:
    trained = list(example.trained[start:stop])
    if trained:
        trained[0] = False  # counted at the end of the piece before
    return replace(example, tokens=example.tokens[start:stop], trained=trained)


def _too_long(item: Item, policy: RowPolicy) -> bool:
    return policy.max_length is not None and any(len(e) > policy.max_length for e in item)


def _require_room(items: Sequence[Item], limit: int | None) -> None:
    if limit is None:
        return
    # In the worst layout every example takes a row as wide as the item's longest.
    large = [item for item in items if len(item) * max(map(len, item)) > limit]
    if large:
        need = max(len(item) * max(map(len, item)) for item in large)
        raise DataError(
            f"{_rows(large)} larger than micro_batch_tokens ({limit}), which a forward pass may "
            f"hold; raise micro_batch_tokens to {need}, or lower max_length"
        )


def _rows(items: Sequence[Item]) -> str:
    """``"3 rows (a.jsonl:1, ...) are"`` or ``"row a.jsonl:7 is"``."""
    names = [item[0].source or "without a source" for item in items[:NAMED]]
    if len(items) == 1:
        return f"row {names[0]} is"
    return f"{len(items)} rows ({', '.join(names)}{', ...' if len(items) > NAMED else ''}) are"
