"""What a message carries, and its bytes.

A payload maps names to tensors and plain values. Encoded it is::

    4 bytes          length of the header, little-endian
    header           JSON: [[name, type, shape or length], ...] in the order of the names
    values           one after the other, little-endian, without padding

The size of a value follows from its entry, so that nothing can be stated twice and disagree. A
payload has exactly one encoding. bfloat16 travels as its bit pattern. Decoding never executes
anything and allocates no more than a few times the bytes that it was given: whatever is wrong with
them is a :class:`PayloadError`.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from anabranch.federated.errors import PayloadError

WIRE_FORMAT = 1
"""Version of this encoding."""

Value = Tensor | bool | int | float | str | bytes
Payload = Mapping[str, Value]

Entry = tuple[str, str, Any]
"""``(name, type, shape)`` of a tensor, ``(name, type, bytes)`` of a text or bytes, else None."""

DTYPES: dict[str, torch.dtype] = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "i64": torch.int64,
    "i32": torch.int32,
    "i16": torch.int16,
    "i8": torch.int8,
    "u32": torch.uint32,
    "u16": torch.uint16,
    "u8": torch.uint8,
    "b8": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SCALARS = {"bool": 1, "int": 8, "float": 8}
_LENGTH = struct.Struct("<I")
_LARGEST_HEADER = 1 << 26


def encode(payload: Payload) -> bytes:
    """The bytes of a payload. Raises :class:`PayloadError` naming a value that has none."""
    names = sorted(payload)
    entries = [entry(name, payload[name]) for name in names]
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    values = [value_bytes(name, payload[name]) for name in names]
    return b"".join((_LENGTH.pack(len(header)), header, *values))


def decode(data: bytes) -> dict[str, Value]:
    """The payload that :func:`encode` turned into these bytes; tensors are copies of their own."""
    entries, start = _header(data)
    view = memoryview(data)
    payload: dict[str, Value] = {}
    for name, kind, size in entries:
        length = value_length(name, kind, size)
        if length > len(data) - start:
            raise PayloadError(
                f"{name!r} takes {length} bytes, but only {len(data) - start} are left of "
                f"{len(data)}; the message was cut off"
            )
        payload[name] = value_of(name, kind, size, view[start : start + length])
        start += length
    if start != len(data):
        raise PayloadError(f"{len(data) - start} bytes follow the last value")
    return payload


def entry(name: str, value: Any) -> Entry:
    """What the header says about a value."""
    if not isinstance(name, str):
        raise PayloadError(f"the name {name!r} is a {type(name).__name__}, not a text")
    if isinstance(value, Tensor):
        if value.dtype not in _NAMES:
            raise PayloadError(
                f"{name!r} is a tensor of {value.dtype}; use one of {', '.join(DTYPES)}"
            )
        return name, _NAMES[value.dtype], list(value.shape)
    if isinstance(value, bool):
        return name, "bool", None
    if isinstance(value, int):
        return name, "int", None
    if isinstance(value, float):
        return name, "float", None
    if isinstance(value, str):
        return name, "str", len(_utf8(name, value))
    if isinstance(value, bytes):
        return name, "bytes", len(value)
    raise PayloadError(
        f"{name!r} is a {type(value).__name__}; a payload holds tensors, numbers, texts and bytes"
    )


def value_bytes(name: str, value: Any) -> bytes:
    """A value without its description."""
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        return flat.view(torch.uint8).numpy().tobytes()
    if isinstance(value, bool):
        return b"\1" if value else b"\0"
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise PayloadError(f"{name!r} is {value}, which does not fit into 64 bits")
        return struct.pack("<q", value)
    if isinstance(value, float):
        return struct.pack("<d", value)
    return _utf8(name, value) if isinstance(value, str) else bytes(value)


def value_length(name: str, kind: str, size: Any) -> int:
    """Bytes that a value takes, from its entry."""
    if kind in DTYPES:
        return math.prod(_shape(name, size)) * DTYPES[kind].itemsize
    if kind in _SCALARS:
        return _SCALARS[kind]
    if kind in ("str", "bytes"):
        return _natural(name, size)
    raise PayloadError(f"{name!r} is of an unknown type {kind!r}")


def value_of(name: str, kind: str, size: Any, data: memoryview) -> Value:
    """The value that these bytes are. Their number is right."""
    if kind in DTYPES:
        shape = _shape(name, size)
        if not data:
            try:
                return torch.empty(shape, dtype=DTYPES[kind])
            except RuntimeError as error:  # the other sides overflow
                raise PayloadError(f"{name!r} has an impossible shape: {error}") from None
        if kind == "b8" and (torch.frombuffer(bytearray(data), dtype=torch.uint8) > 1).any():
            raise PayloadError(f"{name!r} has bytes that are neither true nor false")
        return torch.frombuffer(bytearray(data), dtype=DTYPES[kind]).reshape(shape)
    if kind == "bool":
        if data[0] > 1:
            raise PayloadError(f"{name!r} is neither true nor false")
        return bool(data[0])
    if kind == "int":
        return int(struct.unpack("<q", data)[0])
    if kind == "float":
        return float(struct.unpack("<d", data)[0])
    if kind == "bytes":
        return bytes(data)
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError as error:
        raise PayloadError(f"{name!r} is no UTF-8 text: {error}") from None


def _header(data: bytes) -> tuple[list[Entry], int]:
    """Checked entries, and where the values begin."""
    if len(data) < _LENGTH.size:
        raise PayloadError(f"{len(data)} bytes are too few for a payload")
    length = _LENGTH.unpack_from(data)[0]
    start = _LENGTH.size + length
    if length > _LARGEST_HEADER or start > len(data):
        raise PayloadError(
            f"the header claims {length} bytes; the message has {len(data)}, and a header has at "
            f"most {_LARGEST_HEADER}"
        )
    try:
        entries = json.loads(data[_LENGTH.size : start])
    except (ValueError, RecursionError) as error:
        raise PayloadError(f"the header is no JSON: {error}") from None
    if not isinstance(entries, list):
        raise PayloadError("the header is no list")
    before = None
    for item in entries:
        if not (isinstance(item, list) and len(item) == 3):
            raise PayloadError(f"{str(item)[:80]} in the header is no [name, type, size]")
        name, kind, size = item
        if not (isinstance(name, str) and isinstance(kind, str)):
            raise PayloadError(f"{str(item)[:80]} in the header has no name or type")
        if kind in _SCALARS and size is not None:
            raise PayloadError(f"{name!r} is a single {kind} and has no size")
        if before is not None and name <= before:
            raise PayloadError(f"the header lists {name!r} after {before!r}")
        before = name
    return entries, start


def _shape(name: str, size: Any) -> list[int]:
    if not isinstance(size, list) or len(size) > 32:
        raise PayloadError(f"{name!r} has {str(size)[:80]} for a shape")
    return [_natural(name, side) for side in size]


def _natural(name: str, value: Any) -> int:
    # A tensor without elements may claim any other side; its strides must still be numbers.
    if type(value) is not int or not 0 <= value < 2**31:
        raise PayloadError(f"{name!r} has the size {str(value)[:80]}")
    return value


def _utf8(name: str, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise PayloadError(f"{name!r} is no text: {error}") from None
