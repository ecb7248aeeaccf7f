"""Payloads without a header: both sides agreed on what is in them before the run.

A :class:`Schema` replaces the header, so that a one-byte message costs one byte (Just One Byte)
and a pool of float32 scalars four bytes a seed (FedKSeed). :class:`Wire` is what a run agreed on.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from anabranch.errors import ConfigurationError
from anabranch.federated import payload as encoding
from anabranch.federated.errors import PayloadError
from anabranch.federated.payload import DTYPES, WIRE_FORMAT, Payload, Value

Direction = Literal["down", "up"]
"""``down`` is from the coordinator to a client."""


@dataclass(frozen=True)
class Field:
    """One value of a schema: its name, its type as in a header, and the shape of a tensor.

    A shape may begin with -1, a text or bytes have no length: at most one field of a schema is
    open like that, and takes what the others leave.

    Example: ``Field("gradients", "i8", (-1,))``.
    """

    name: str
    type: str
    shape: tuple[int, ...] | None = None

    @property
    def open(self) -> bool:
        """Whether its length follows from that of the message."""
        return self.type in ("str", "bytes") or (self.shape is not None and -1 in self.shape)


@dataclass(frozen=True)
class Schema:
    """The values of a message in the order in which they are sent."""

    fields: tuple[Field, ...]

    def __post_init__(self) -> None:
        known = [*DTYPES, "bool", "int", "float", "str", "bytes"]
        for item in self.fields:
            if item.type not in known:
                raise ConfigurationError(f"schema field {item.name!r}: no type {item.type!r}")
            if (item.type in DTYPES) != (item.shape is not None):
                raise ConfigurationError(f"schema field {item.name!r}: a tensor has a shape")
            if item.shape is not None and -1 in item.shape[1:]:
                raise ConfigurationError(f"schema field {item.name!r}: only the first side is open")
        if sum(item.open for item in self.fields) > 1:
            raise ConfigurationError("only one field of a schema may be of open length")
        if len({item.name for item in self.fields}) != len(self.fields):
            raise ConfigurationError("a schema names a field twice")

    def encode(self, payload: Payload) -> bytes:
        """Only the values. Raises :class:`PayloadError` if they are not those of the schema."""
        if payload.keys() != {item.name for item in self.fields}:
            raise PayloadError(
                f"the payload has {sorted(payload)}, the schema {[f.name for f in self.fields]}"
            )
        for item in self.fields:
            _, kind, size = encoding.entry(item.name, payload[item.name])
            fits = kind == item.type
            if fits and item.shape is not None:
                fits = len(size) == len(item.shape) and all(
                    wanted in (-1, got) for wanted, got in zip(item.shape, size, strict=True)
                )
            if not fits:
                raise PayloadError(f"{item.name!r} is {kind} {size}, the schema says {item}")
        return b"".join(encoding.value_bytes(f.name, payload[f.name]) for f in self.fields)

    def decode(self, data: bytes) -> dict[str, Value]:
        """The payload of these bytes; :class:`PayloadError` if their number is wrong."""
        fixed = sum(_length(f) for f in self.fields if not f.open)
        free = len(data) - fixed
        if free < 0 or (free and not any(f.open for f in self.fields)):
            raise PayloadError(f"the schema takes {fixed} bytes; the message has {len(data)}")
        view, start, payload = memoryview(data), 0, dict[str, Value]()
        for item in self.fields:
            size = _open_size(item, free) if item.open else _size(item)
            length = encoding.value_length(item.name, item.type, size)
            part = view[start : start + length]
            payload[item.name] = encoding.value_of(item.name, item.type, size, part)
            start += length
        return payload


@dataclass(frozen=True)
class Wire:
    """How the messages of a run are encoded: by a schema where there is one for their kind."""

    schemas: Mapping[tuple[Direction, str], Schema] = field(default_factory=dict)

    def encode(self, direction: Direction, kind: str, payload: Payload) -> bytes:
        """Bytes of a message's payload."""
        schema = self.schemas.get((direction, kind))
        return encoding.encode(payload) if schema is None else schema.encode(payload)

    def decode(self, direction: Direction, kind: str, data: bytes) -> dict[str, Value]:
        """The payload of a message."""
        schema = self.schemas.get((direction, kind))
        return encoding.decode(data) if schema is None else schema.decode(data)

    @property
    def fingerprint(self) -> str:
        """Equal on two sides that understand each other."""
        agreed: dict[str, Sequence[Any]] = {
            f"{direction} {kind}": [[f.name, f.type, f.shape] for f in schema.fields]
            for (direction, kind), schema in self.schemas.items()
        }
        text = json.dumps([WIRE_FORMAT, agreed], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _size(item: Field) -> Any:
    return None if item.shape is None else list(item.shape)


def _length(item: Field) -> int:
    return encoding.value_length(item.name, item.type, _size(item))


def _open_size(item: Field, free: int) -> Any:
    if item.shape is None:
        return free
    row = math.prod(item.shape[1:]) * DTYPES[item.type].itemsize
    if row == 0 or free % row:
        raise PayloadError(f"{item.name!r} has rows of {row} bytes; {free} bytes are left for it")
    return [free // row, *item.shape[1:]]
