"""What goes between coordinator and clients: an envelope, and a body that it does not look into.

On a network a message is ``len(envelope) as 4 bytes, envelope, body``; the envelope is JSON.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from anabranch.errors import ConfigurationError
from anabranch.federated.errors import PayloadError

_LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class Work:
    """How much a client should do; what is None is left to the client's own options.

    ``steps`` are optimiser steps, ``lr_scale`` multiplies the client's learning rate.
    """

    steps: int | None = None
    epochs: float | None = None
    tokens: int | None = None
    batch_size: int | None = None
    lr_scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("steps", "epochs", "tokens", "batch_size"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigurationError(f"a task's {name} are above 0, not {value}")


UNSPECIFIED = Work()
"""Everything is left to the client."""


@dataclass(frozen=True)
class Task:
    """The coordinator asks a client for something.

    ``id`` counts the tasks of a run from 1. ``exchange`` is the id of the first task of a chain of
    messages; it equals ``id`` unless the task continues one, as its ``turn``-th follow-up.
    ``version`` is the number of commits before it was sent, at ``sent`` seconds of the run. After
    ``deadline`` nobody waits for it.

    ``accepted`` is the client's newest task whose reply counts, 0 if there is none. ``awaited`` is
    its oldest task under way, this one included: a task between the two was in vain. Replies to
    tasks below ``settled`` are never asked for again.
    """

    id: int
    client: str
    kind: str
    version: int
    sent: float
    work: Work = UNSPECIFIED
    deadline: float | None = None
    exchange: int = 0
    turn: int = 0
    accepted: int = 0
    awaited: int = 0
    settled: int = 0
    body: bytes = field(default=b"", repr=False)

    @property
    def draw(self) -> tuple[int, ...]:
        """What randomness is derived from: the ids of follow-ups hang on who replied first."""
        return (self.exchange, self.turn) if self.turn else (self.exchange or self.id,)

    def envelope(self) -> bytes:
        """Everything but the body."""
        return _envelope(self)

    def to_bytes(self) -> bytes:
        """The message on a network."""
        return _message(self.envelope(), self.body)

    @classmethod
    def from_bytes(cls, data: bytes) -> Task:
        """The task of a message; :class:`PayloadError` if it is none."""
        values, body = _split(data)
        work = values.get("work")
        if not isinstance(work, dict):
            raise PayloadError("the envelope of a task has no work")
        return _build(cls, {**values, "work": _build(Work, work), "body": body})


@dataclass(frozen=True)
class Reply:
    """What a client made of a task.

    ``examples`` is how much data stands behind it, as the client says. ``units`` is the work that
    it took, in the unit of :class:`DeviceProfile`. ``error`` is empty, or why there is no body.
    """

    task: int
    client: str
    kind: str
    version: int
    examples: int = 0
    units: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    error: str = ""
    body: bytes = field(default=b"", repr=False)

    def envelope(self) -> bytes:
        """Everything but the body."""
        return _envelope(self)

    def to_bytes(self) -> bytes:
        """The message on a network."""
        return _message(self.envelope(), self.body)

    @classmethod
    def from_bytes(cls, data: bytes) -> Reply:
        """The reply of a message; :class:`PayloadError` if it is none."""
        values, body = _split(data)
        return _build(cls, {**values, "body": body})


Message = TypeVar("Message", Task, Reply, Work)

_CHECKS: Mapping[str, Any] = {
    "int": lambda v: type(v) is int,
    "str": lambda v: isinstance(v, str),
    "float": lambda v: type(v) in (int, float) and math.isfinite(v),
    "int | None": lambda v: v is None or type(v) is int,
    "float | None": lambda v: v is None or (type(v) in (int, float) and math.isfinite(v)),
    "Mapping[str, float]": lambda v: (
        isinstance(v, dict) and all(type(number) in (int, float) for number in v.values())
    ),
}


def _envelope(message: Task | Reply) -> bytes:
    values = {name: value for name, value in vars(message).items() if name != "body"}
    if isinstance(message, Task):
        values["work"] = vars(message.work)
    return json.dumps(values, separators=(",", ":")).encode()


def _message(envelope: bytes, body: bytes) -> bytes:
    return b"".join((_LENGTH.pack(len(envelope)), envelope, body))


def _split(data: bytes) -> tuple[dict[str, Any], bytes]:
    if len(data) < _LENGTH.size:
        raise PayloadError(f"{len(data)} bytes are too few for a message")
    end = _LENGTH.size + _LENGTH.unpack_from(data)[0]
    if end > len(data):
        raise PayloadError(f"the envelope ends at byte {end} of {len(data)}; it was cut off")
    try:
        values = json.loads(data[_LENGTH.size : end])
    except (ValueError, RecursionError) as error:
        raise PayloadError(f"the envelope is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise PayloadError("the envelope is no JSON object")
    return values, data[end:]


def _build(cls: type[Message], values: dict[str, Any]) -> Message:
    kinds = cls.__annotations__
    for name, value in values.items():
        if name not in kinds:
            raise PayloadError(f"{cls.__name__.lower()}: there is no field {name[:80]!r}")
        check = _CHECKS.get(kinds[name])
        if check is not None and not check(value):
            raise PayloadError(
                f"{cls.__name__.lower()}: {name} should be {kinds[name]}, not {str(value)[:80]}"
            )
    try:
        return cls(**values)
    except TypeError as error:
        raise PayloadError(f"{cls.__name__.lower()}: {error}") from None
