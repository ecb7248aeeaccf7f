"""From the bytes of a reply to an update that may be used, or the reason why not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from anabranch.federated.codecs import Codec
from anabranch.federated.errors import ClientFailed, NotFinite, PayloadError, PayloadMismatch
from anabranch.federated.incidents import Incidents
from anabranch.federated.messages import Reply, Task
from anabranch.federated.payload import Payload, Value
from anabranch.federated.server import Server, Update
from anabranch.federated.wire import Wire

NotFinitePolicy = Literal["reject", "zero", "raise"]


def read_reply(
    task: Task,
    reply: Reply,
    *,
    version: int,
    now: float,
    declared: int,
    server: Server,
    wire: Wire,
    codec: Codec,
    not_finite: NotFinitePolicy,
    incidents: Incidents,
) -> Update:
    """The update of a reply that arrives at this version and time.

    Raises :class:`ReplyRefused` naming client and tensor if it cannot be used: the client failed,
    the bytes are no payload, tensors are missing, too many or of another shape, or values are NaN
    or infinite.
    """
    if reply.error:
        raise ClientFailed(f"{task.client}: {reply.error}")
    payload: dict[str, Value] = {"body": reply.body}
    if not server.opaque:
        payload = codec.decode(wire.decode("up", task.kind, reply.body))
        expected = server.expects(task.client, task.kind)
        if expected is not None:
            require_same(task.client, expected, payload)
        payload = _finite(task.client, payload, not_finite, incidents)
    return Update(
        task=task.id,
        client=task.client,
        kind=task.kind,
        version=task.version,
        payload=payload,
        examples=_believable(task.client, reply.examples, declared, incidents),
        staleness=version - task.version,
        units=reply.units,
        seconds=now - task.sent,
        metrics=reply.metrics,
    )


def require_same(client: str, expected: Mapping[str, Tensor], payload: Payload) -> None:
    """:class:`PayloadMismatch` unless names, shapes and types of the tensors are these."""
    got = {name: value for name, value in payload.items() if isinstance(value, Tensor)}
    for name in sorted(expected.keys() | got.keys()):
        wanted, found = expected.get(name), got.get(name)
        if (
            wanted is None
            or found is None
            or wanted.shape != found.shape
            or wanted.dtype != found.dtype
        ):
            raise PayloadMismatch(client, name, _described(wanted), _described(found))


def _described(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"


def _finite(
    client: str, payload: dict[str, Value], policy: NotFinitePolicy, incidents: Incidents
) -> dict[str, Value]:
    cleaned = dict(payload)
    for name, value in payload.items():
        if isinstance(value, float):
            bad = int(not math.isfinite(value))
        elif isinstance(value, Tensor) and value.is_floating_point():
            bad = not_finite_values(value)
        else:
            continue
        if not bad:
            continue
        if policy != "zero":
            raise NotFinite(client, name, bad)
        incidents.record("zeroed", client, f"{name}: {bad} values were NaN or infinite")
        cleaned[name] = torch.nan_to_num(value, 0.0, 0.0, 0.0) if isinstance(value, Tensor) else 0.0
    return cleaned


def not_finite_values(tensor: Tensor) -> int:
    """How many values are NaN or infinite."""
    # NaN and infinity survive addition, and a sum is one pass without a copy.
    if math.isfinite(float(tensor.sum())):
        return 0
    return int((~tensor.isfinite()).sum())


def _believable(client: str, examples: int, declared: int, incidents: Incidents) -> int:
    """No client weighs more than the data that it declared when it joined."""
    if examples < 0:
        raise PayloadError(f"{client} says that it used {examples} examples")
    if examples > declared:
        incidents.record(
            "examples capped", client, f"says {examples} examples, but declared {declared}"
        )
    return min(examples, declared)
