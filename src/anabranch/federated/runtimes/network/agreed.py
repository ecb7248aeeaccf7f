"""What both sides of a run must have alike, as JSON, and the check that they do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from anabranch.federated.client import Client
from anabranch.federated.codecs import Codec, Identity
from anabranch.federated.errors import FederationError
from anabranch.federated.node import Agreement
from anabranch.federated.wire import Field, Schema, Wire


def to_json(agreement: Agreement, absent_after: float) -> dict[str, Any]:
    """The coordinator's half. ``absent_after``: seconds of silence after which a site has left."""
    return {
        "seed": agreement.seed,
        "wire": agreement.wire.fingerprint,
        "schemas": [
            [direction, kind, [asdict(field) for field in schema.fields]]
            for (direction, kind), schema in agreement.wire.schemas.items()
        ],
        "up": repr(agreement.up),
        "down": repr(agreement.down),
        "absent_after": absent_after,
    }


def agree(
    values: Mapping[str, Any],
    client: Client,
    up: Codec | None = None,
    down: Codec | None = None,
    folder: Path | None = None,
) -> Agreement:
    """The site's half. Raises :class:`FederationError` naming what differs."""
    up, down = up or Identity(), down or Identity()
    for name, own in (("up", up), ("down", down)):
        if values[name] != repr(own):
            raise FederationError(
                f"the coordinator's codec {name} is {values[name]}, but {own!r} here; both sides "
                f"need the same job and version of anabranch"
            )
    schemas = {
        (direction, kind): Schema(
            tuple(
                Field(f["name"], f["type"], None if f["shape"] is None else tuple(f["shape"]))
                for f in fields
            )
        )
        for direction, kind, fields in values["schemas"]
    }
    wire = Wire(schemas)
    if wire.fingerprint != values["wire"]:
        raise FederationError(
            "the coordinator encodes messages in another way; both sides need the same version of "
            "anabranch"
        )
    return Agreement(client, int(values["seed"]), wire, up, down, folder)
