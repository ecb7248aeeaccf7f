"""What a Flower message carries: one ConfigRecord with one value, the bytes of a letter.

A letter is ``length of the header as 4 bytes, header, body``; the header is JSON. Flower never
looks into it, and so never checks, averages or converts what the federation's own encoding says.

==========  =============================================  ============================
kind        facts                                          body
==========  =============================================  ============================
``who``     none                                           none
``here``    ``name``, ``examples``                         none
``task``    ``run``, ``agreement``                         :meth:`Task.to_bytes`
``reply``   none                                           :meth:`Reply.to_bytes`
``problem`` ``reason``                                     none
==========  =============================================  ============================
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from anabranch.federated.errors import PayloadError

_LENGTH = struct.Struct("<I")

RECORD = "anabranch"
VALUE = "letter"


@dataclass(frozen=True)
class Letter:
    """See the module's table for what a letter of a kind has."""

    kind: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    body: bytes = field(default=b"", repr=False)

    def to_bytes(self) -> bytes:
        """What travels."""
        header = json.dumps({"kind": self.kind, **self.facts}, separators=(",", ":")).encode()
        return b"".join((_LENGTH.pack(len(header)), header, self.body))

    @classmethod
    def from_bytes(cls, data: bytes) -> Letter:
        """The letter of these bytes; :class:`PayloadError` if they are none."""
        end = _LENGTH.size + (_LENGTH.unpack_from(data)[0] if len(data) >= _LENGTH.size else 0)
        if not _LENGTH.size < end <= len(data):
            raise PayloadError(f"{len(data)} bytes are no letter: they were cut off")
        try:
            facts = json.loads(data[_LENGTH.size : end])
        except (ValueError, RecursionError) as error:
            raise PayloadError(f"the header of a letter is no JSON: {error}") from None
        if not isinstance(facts, dict) or not isinstance(kind := facts.pop("kind", None), str):
            raise PayloadError("the header of a letter names no kind")
        return cls(kind, facts, data[end:])
