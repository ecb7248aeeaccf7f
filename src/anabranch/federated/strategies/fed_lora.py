"""LoRA with one factor frozen: what exact averaging costs where the other factor is LoRA's own."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from anabranch.federated.adapter_agreement import describe_adapter, digest_of
from anabranch.federated.client import Answer, Client, ClientContext
from anabranch.federated.local import LocalTraining
from anabranch.federated.payload import Value
from anabranch.federated.server import Server
from anabranch.federated.shared import shared_tensors
from anabranch.federated.strategies.fedit import FedIT, FedITClient, FedITServer

logger = logging.getLogger(__name__)

_FROZEN = ".lora_A."


class FFA(FedIT):
    """FedIT with LoRA's A frozen: B is averaged exactly, and messages are half (Sun et al. 2024).

    "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024, section 4 (FFA-LoRA). Use
    it as the baseline of Fed-SB, which has better frozen factors and trains less between them. A
    stays as the adapter was made, so all parties must make it alike; whoever holds another A is
    refused. What else is trained is averaged, too. The options are FedIT's.
    """

    name = "ffa"

    def begin(self, model: nn.Module) -> Server:
        """Averages all but A."""
        start = {n: t for n, t in shared_tensors(model).items() if _FROZEN not in n}
        if not _frozen(model):
            logger.warning("ffa freezes LoRA's A, and this model has none: this is fedit")
        return FedITServer(self, start, _described(model))

    def client(self, local: LocalTraining) -> Client:
        """Trains all but A."""
        return _FFAClient(local, self.upload)


class _FFAClient(FedITClient):
    def describe(self, model: nn.Module) -> str:
        """The adapter's settings and its A."""
        return _described(model)

    def run(self, ctx: ClientContext, kind: str, payload: dict[str, Value]) -> Answer:
        """Train with A frozen."""
        with _without_a(ctx.model):
            return super().run(ctx, kind, payload)


def _described(model: nn.Module) -> str:
    return describe_adapter(model, frozen=digest_of(_frozen(model)))


def _frozen(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if _FROZEN in name}


@contextmanager
def _without_a(model: nn.Module) -> Iterator[None]:
    parameters = [p for n, p in model.named_parameters() if _FROZEN in n and p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
