"""pFedMe: everyone keeps a model of their own, on a leash to the one that all learn together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from anabranch.errors import ConfigurationError
from anabranch.federated.client import Answer, Client, ClientContext
from anabranch.federated.local import LocalTraining
from anabranch.federated.payload import Value
from anabranch.federated.personal import PERSONAL, personal_tensors
from anabranch.federated.randomness import derive_seed
from anabranch.federated.shared import tensors_of
from anabranch.federated.strategies.fedprox import FedProx, ProximalClient


class PFedMe(FedProx):
    """Gradient descent on Moreau envelopes of the clients' losses (T Dinh, Tran and Nguyen 2020).

    "Personalized Federated Learning with Moreau Envelopes", algorithm 1.

    Use it where clients' data differ so much that one model does not do for all, for example with
    an adapter as what is trained. A client minimises ``f(v) + lam / 2 |v - w|^2`` over its personal
    model v, and moves ``w <- w - step (w - v)``; ``step`` is the paper's eta times lambda. It does
    so ``solves`` times (R), each with as many optimiser steps as a task has (K), and sends what w
    became. Larger ``lam`` holds personal models nearer to the common one; training is stable only
    while the learning rate stays below ``2 / lam``. ``server_lr`` is the paper's beta.

    The personal model stays in ``ctx.state`` and is where the next minimisation begins; ``warm``
    false begins at w. With ``lam`` 0, ``step`` 1, one solve and no warm start it is FedAvg. The
    other options are FedAvg's. ``anabranch federation compare`` shows the personal models.
    """

    name = "pfedme"
    private = False

    def __init__(
        self,
        lam: float = 1.0,
        step: float = 1.0,
        solves: int = 1,
        warm: bool = True,
        **options: Any,
    ) -> None:
        if not lam >= 0:
            raise ConfigurationError(f"lam is at least 0, not {lam}")
        if not 0 < step <= 1:
            raise ConfigurationError(f"step is above 0 and at most 1, not {step}")
        if not (isinstance(solves, int) and solves >= 1):
            raise ConfigurationError(f"solves is a number of at least 1, not {solves!r}")
        super().__init__(mu=lam, **options)
        self.step, self.solves, self.warm = step, solves, warm

    def client(self, local: LocalTraining) -> Client:
        """Minimises near the common model, and keeps what it finds."""
        return _MoreauClient(local, self)


class _MoreauClient(ProximalClient):
    def __init__(self, local: LocalTraining, options: PFedMe) -> None:
        super().__init__(local, options.upload, options.mu)
        self.options = options

    def run(self, ctx: ClientContext, kind: str, payload: dict[str, Value]) -> Answer:
        """What w became; the personal model stays here."""
        start = w = tensors_of(payload)
        own = personal_tensors(ctx.state) if self.options.warm else {}
        examples = 0
        for number in range(self.options.solves):
            # Each solve sees its own order of the data; the first is any other method's.
            task = replace(ctx, seed=derive_seed(ctx.seed, number)) if number else ctx
            result = self.local.run(task, own or w, self.hooks(ctx, w))
            ctx.units, examples = task.units, result.examples
            if not examples:
                break
            ctx.state[PERSONAL] = result.tensors
            own = result.tensors if self.options.warm else {}
            w = self._moved(w, result.tensors)
        if self.upload == "weights":
            return w, examples
        return {name: w[name] - x for name, x in start.items()}, examples

    def _moved(self, w: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.options.step == 1:
            return dict(own)
        return {name: x - self.options.step * (x - own[name]) for name, x in w.items()}
