"""A site's half of a secure sum."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from anabranch.federated.client import Answer, Client, ClientContext
from anabranch.federated.errors import FederationError, PayloadError
from anabranch.federated.payload import Value
from anabranch.federated.secure import masks, shamir
from anabranch.federated.secure.fixed_point import flatten
from anabranch.federated.secure.protocol import (
    KEYS,
    PHASES,
    SHARES,
    TRAIN,
    UNMASK,
    SecureOptions,
    letters,
    pair_mask,
)
from anabranch.federated.shared import tensors_of

SPENT = "epsilon/"
"""Metrics under this prefix are of a site's privacy account, not of its examples."""


class OutOfTurn(FederationError):
    """The coordinator asks for something that it may not know now, or not again."""


class SecureClient(Client):
    """Lets ``inner`` train, and sends its update masked.

    The weight is the number of examples, or 1 for each site with any if ``uniform``. Secrets live
    in personal state from the first message of a round to the last, and each phase is answered once
    a round. Metrics are not sent, but for the loss: the sum holds that of each site once.
    """

    def __init__(self, inner: Client, options: SecureOptions, uniform: bool = False) -> None:
        masks.require_cryptography()
        self.inner = inner
        self.options = options
        self.uniform = uniform

    def setup(self, ctx: ClientContext) -> None:
        """The inner client's."""
        ctx.state["inner"] = {}
        self.inner.setup(replace(ctx, state=ctx.state["inner"]))

    def run(self, ctx: ClientContext, kind: str, payload: dict[str, Value]) -> Answer:
        """One phase."""
        if kind not in PHASES:
            raise FederationError(f"a secure sum has {', '.join(PHASES)}, no {kind!r}")
        before = ctx.state.get("secure", {})
        if kind != KEYS and before.get("next") != kind:
            raise OutOfTurn(
                f"{ctx.name} is asked for {kind!r}, but {before.get('next') or 'keys'!r} is next: "
                f"nothing is told twice in a round"
            )
        if kind == KEYS:
            answer = self._keys(ctx)
        elif kind == SHARES:
            answer = self._shares(ctx, payload)
        elif kind == TRAIN:
            answer = self._train(ctx, payload)
        else:
            answer = self._unmask(ctx, payload)
        return answer, 0

    def _keys(self, ctx: ClientContext) -> dict[str, Value]:
        seal, seal_public = masks.new_pair()
        mask, mask_public = masks.new_pair()
        ctx.state["secure"] = {"next": SHARES, "seal": seal, "mask": mask}
        return {"seal": seal_public, "mask": mask_public}

    def _shares(self, ctx: ClientContext, payload: Mapping[str, Value]) -> dict[str, Value]:
        """Cut the masking key and the own seed into shares, and seal each pair for its site."""
        own = ctx.state["secure"]
        seals, maskings = letters(payload, "seal"), letters(payload, "mask")
        names = sorted(seals)
        mine = (seals.get(ctx.name), maskings.get(ctx.name))
        if seals.keys() != maskings.keys() or mine != tuple(
            masks.public_of(own[use]) for use in ("seal", "mask")
        ):
            raise PayloadError("the public keys are not those of sites, this one's among them")
        if len({*seals.values(), *maskings.values()}) < 2 * len(names):
            raise PayloadError("two public keys are the same")
        threshold = self.options.require(KEYS, names, len(names))
        seed = os.urandom(shamir.SECRET_BYTES)
        cut = zip(
            shamir.split(own["mask"], threshold, len(names)),
            shamir.split(seed, threshold, len(names)),
            strict=True,
        )
        sealed: dict[str, Value] = {"commitment": hashlib.sha256(seed).digest()}
        for name, (of_key, of_seed) in zip(names, cut, strict=True):
            if name == ctx.name:
                own["kept"] = of_key + of_seed
            else:
                key = masks.agree(own["seal"], seals[name], "seal")
                sealed[f"for/{name}"] = masks.seal(key, of_key + of_seed, _about(ctx.name, name))
        own |= {"next": TRAIN, "seed": seed, "seals": seals, "maskings": maskings}
        return sealed

    def _train(self, ctx: ClientContext, payload: dict[str, Value]) -> dict[str, Value]:
        """Train, weigh, round, mask."""
        own = ctx.state["secure"]
        sealed = letters(payload, "from")
        names = sorted({*sealed, ctx.name})
        if not own["seals"].keys() >= sealed.keys():
            raise PayloadError("there are shares of sites that sent no keys")
        self.options.require(SHARES, names, len(own["seals"]))
        inner = replace(ctx, state=ctx.state["inner"])
        start = {name: value for name, value in payload.items() if not name.startswith("from/")}
        update, examples = self.inner.run(inner, TRAIN, start)
        ctx.units = inner.units
        loss = ctx.metrics.get("loss", math.nan)
        for name in [name for name in ctx.metrics if not name.startswith(SPENT)]:
            del ctx.metrics[name]
        weight = min(examples, 1) if self.uniform else examples
        of_loss = min(examples, 1) if math.isfinite(loss) else 0
        numbers, sites = self.options.numbers, len(names)
        vector = np.concatenate(
            [
                numbers.encode(flatten(tensors_of(update)), weight, sites),
                numbers.whole(weight, sites, "the weight"),
                numbers.whole(of_loss, sites, "the number of losses"),
                numbers.encode(np.array([loss if of_loss else 0.0]), of_loss, sites, "the loss"),
            ]
        )
        vector += masks.stream(own["seed"], len(vector), vector.dtype)
        for name in names:
            if name != ctx.name:
                vector += pair_mask(
                    ctx.name, name, own["mask"], own["maskings"][name], len(vector), vector.dtype
                )
        own |= {"next": UNMASK, "sealed": sealed}
        return {"masked": numbers.to_tensor(vector)}

    def _unmask(self, ctx: ClientContext, payload: Mapping[str, Value]) -> dict[str, Value]:
        """One of the two secrets of every other site, according to whether its update is there."""
        own = ctx.state["secure"]
        sealed: Mapping[str, bytes] = own["sealed"]
        sent = set(letters(payload, "sent"))
        if not ({*sealed, ctx.name} >= sent and ctx.name in sent):
            raise PayloadError("the sites that sent an update are not those of this round")
        self.options.require(TRAIN, sent, len(own["seals"]))
        told: dict[str, Value] = {}
        for name in sorted({*sealed, ctx.name}):
            if name == ctx.name:
                both = own["kept"]
            else:
                key = masks.agree(own["seal"], own["seals"][name], "seal")
                both = masks.unseal(key, sealed[name], _about(name, ctx.name))
            of_key, of_seed = both[: shamir.SHARE_BYTES], both[shamir.SHARE_BYTES :]
            use, share = ("seed", of_seed) if name in sent else ("key", of_key)
            told[f"{use}/{name}"] = share
        ctx.state["secure"] = {"next": KEYS}  # the round's secrets are gone
        return told


def _about(sender: str, receiver: str) -> bytes:
    """What a sealed share is bound to, so that it cannot be passed off as another's."""
    return f"{len(sender)}:{sender}{receiver}".encode()
