"""The coordinator's half of a secure sum: it opens sums, and cannot open what they are made of."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anabranch.errors import ConfigurationError
from anabranch.federated.errors import EmptyRound, PayloadError
from anabranch.federated.messages import Reply
from anabranch.federated.payload import Payload
from anabranch.federated.secure import masks, shamir
from anabranch.federated.secure.fixed_point import unflatten
from anabranch.federated.secure.protocol import (
    EXTRA,
    KEYS,
    SHARES,
    TRAIN,
    UNMASK,
    SecureOptions,
    WrongShares,
    letters,
    pair_mask,
)
from anabranch.federated.server import Accumulator, Server, ServerContext, Update
from anabranch.federated.strategies.fedavg import FedAvgServer


class SecureServer(Server):
    """Gives ``inner`` the weighted mean of a round as if it were one site's update.

    Works with servers that use nothing but that mean: those of FedAvg and its kin with the rule
    ``mean``. Raises :class:`ConfigurationError` for others.
    """

    def __init__(self, inner: Server, options: SecureOptions) -> None:
        masks.require_cryptography()
        self.inner: FedAvgServer = require_linear(inner)
        self.options = options
        self._round: dict[str, Any] = _new_round()

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The present version."""
        return self.inner.tensors

    def setup(self, ctx: ServerContext) -> None:
        """The inner server's."""
        self.inner.setup(ctx)

    def settings(self) -> dict[str, Any]:
        """The method's, and how it is summed."""
        return {**self.inner.settings(), "secure": self.options.settings()}

    def message(self, client: str, kind: str) -> Payload:
        """What a phase begins with."""
        made = self._round
        if kind == KEYS:
            return {}
        if kind == SHARES:
            return {
                f"{use}/{name}": key for use in ("seal", "mask") for name, key in made[use].items()
            }
        if kind == TRAIN:
            sealed = {
                f"from/{name}": shares[client]
                for name, shares in made["shares"].items()
                if name != client
            }
            return {**self.inner.message(client, TRAIN), **sealed}
        return {f"sent/{name}": b"" for name in made["sent"]}

    def expects(self, client: str, kind: str) -> Mapping[str, Tensor] | None:
        """A masked update has as many numbers as the model, and three more."""
        if kind != TRAIN:
            return {}
        return {"masked": torch.empty(self._size, dtype=self.options.numbers.wire_dtype)}

    def respond(self, reply: Reply, payload: Payload) -> str | None:
        """Note what a phase is for; a barrier, not the reply, leads to the next one."""
        made, name = self._round, reply.client
        if reply.kind == KEYS:
            for use in ("seal", "mask"):
                made[use][name] = _bytes(payload, use, masks.KEY_BYTES)
        elif reply.kind == SHARES:
            shares = letters(payload, "for")
            if shares.keys() != made["seal"].keys() - {name}:
                raise PayloadError(f"{name} has no share for each of the others")
            made["commitments"][name] = _bytes(payload, "commitment", 32)
            made["shares"][name] = shares
        elif reply.kind == TRAIN:
            numbers = self.options.numbers
            masked = payload["masked"]
            assert isinstance(masked, Tensor)
            total = numbers.from_tensor(masked).copy()
            if made["total"] is not None:
                total += numbers.from_tensor(made["total"])
            made["total"] = numbers.to_tensor(total)
            made["sent"].append(name)
        elif reply.kind == UNMASK:
            told = {use: letters(payload, use) for use in ("seed", "key")}
            sent = set(made["sent"])
            others = made["shares"].keys() - sent
            for share in (*told["seed"].values(), *told["key"].values()):
                if len(share) != shamir.SHARE_BYTES:
                    raise PayloadError(f"{name} tells a share of {len(share)} bytes")
            if told["seed"].keys() != sent or told["key"].keys() != others:
                raise PayloadError(f"{name} tells shares of other sites than it was asked for")
            made["told"][name] = told
        return None

    def fold(self, acc: Accumulator, update: Update) -> Accumulator:
        """Count: everything is noted by :meth:`respond` already."""
        return (acc or 0) + 1

    def commit(self, acc: Accumulator) -> Mapping[str, float]:
        """Open the sum, and let the inner server make a version of the mean."""
        made, self._round = self._round, _new_round()
        sites = sorted(made["seal"])
        for stage, there in (
            (KEYS, sites),
            (SHARES, made["shares"]),
            (TRAIN, made["sent"]),
            (UNMASK, made["told"]),
        ):
            self.options.require(stage, there, len(sites))
        total = self._open(made, sites)
        numbers = self.options.numbers
        weight, losses = (int(number) for number in total[-EXTRA:-1])
        if not weight:
            raise EmptyRound("no site of the secure sum has any examples")
        sums = numbers.decode(total)
        mean = unflatten(sums[:-EXTRA] / weight, self.inner.tensors)
        update = Update(0, "", TRAIN, 0, dict(mean), weight, 0, 0.0, 0.0, {})
        figures = dict(self.inner.commit(self.inner.fold(None, update)))
        if losses:
            figures["loss"] = float(sums[-1]) / losses
        return {**figures, "sites": len(made["sent"])}

    def _open(self, made: Mapping[str, Any], sites: list[str]) -> np.ndarray[Any, Any]:
        """The sum without masks, [d + 3]."""
        numbers = self.options.numbers
        total = numbers.from_tensor(made["total"]).copy()
        for name in made["sent"]:
            seed = self._recover(made, sites, "seed", name)
            if seed is None or hashlib.sha256(seed).digest() != made["commitments"][name]:
                raise WrongShares(f"the shares of {name}'s seed do not give what it committed to")
            total -= masks.stream(seed, len(total), total.dtype)
        for name in made["shares"].keys() - set(made["sent"]):
            key = self._recover(made, sites, "key", name)
            if key is None or masks.public_of(key) != made["mask"][name]:
                raise WrongShares(f"the shares of {name}'s key do not give its private key")
            for other in made["sent"]:
                # What the other one added for it, and nobody took away again.
                added = pair_mask(other, name, key, made["mask"][other], len(total), total.dtype)
                total -= added
        return total

    def _recover(
        self, made: Mapping[str, Any], sites: list[str], use: str, name: str
    ) -> bytes | None:
        needed = self.options.needed(len(sites))
        tellers = sorted(made["told"])[:needed]
        return shamir.recover(
            {sites.index(teller) + 1: made["told"][teller][use][name] for teller in tellers}
        )

    @property
    def _size(self) -> int:
        return sum(tensor.numel() for tensor in self.inner.tensors.values()) + EXTRA

    def state_dict(self) -> dict[str, Any]:
        """The inner server's, and the round under way."""
        return {"inner": self.inner.state_dict(), "round": self._round}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        self.inner.load_state_dict(state["inner"])
        self._round = state["round"]


def require_linear(server: Server) -> FedAvgServer:
    """Raise :class:`ConfigurationError` naming why a server cannot do with a sum alone."""
    name = type(server).__name__
    if not isinstance(server, FedAvgServer):
        raise ConfigurationError(
            f"{name} needs more than the weighted mean of the updates; a secure sum gives no more: "
            f"use fedavg, fedprox or fedadam"
        )
    if not server.associative:
        raise ConfigurationError(
            f"the rule {server.options.rule.name} looks at each update, which a secure sum hides; "
            f"use mean"
        )
    if getattr(server.options, "diagnose", False):
        raise ConfigurationError(f"{name} with diagnose looks at each update: use diagnose=False")
    if server.schemas():
        raise ConfigurationError(f"{name} has messages of its own form: use compact=False")
    return server


def _new_round() -> dict[str, Any]:
    return {
        "seal": {},
        "mask": {},
        "commitments": {},
        "shares": {},
        "total": None,
        "sent": [],
        "told": {},
    }


def _bytes(payload: Payload, name: str, length: int) -> bytes:
    value = payload.get(name)
    if not isinstance(value, bytes) or len(value) != length:
        raise PayloadError(f"{name!r} should be {length} bytes")
    return value
