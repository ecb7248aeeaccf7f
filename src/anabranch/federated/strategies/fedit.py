"""FedIT: instructions stay where they were written, LoRA adapters travel."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from anabranch import adapters
from anabranch.federated.adapter_agreement import describe_adapter, require_same_adapter
from anabranch.federated.client import Answer, Client, ClientContext
from anabranch.federated.local import LocalTraining
from anabranch.federated.payload import DTYPES, Payload, Value
from anabranch.federated.server import Accumulator, Server, Update
from anabranch.federated.shared import lent, shared_tensors
from anabranch.federated.strategies.fedavg import FedAvg, FedAvgServer, LocalClient, Upload
from anabranch.federated.wire import Direction, Field, Schema

if TYPE_CHECKING:
    from anabranch.federated.coordinator import Coordinator

_TYPES = {dtype: name for name, dtype in DTYPES.items()}


class FedIT(FedAvg):
    """Clients tune LoRA on their own instructions, the server averages A and B (Zhang et al. 2024).

    "Towards Building the Federated GPT: Federated Instruction Tuning", section 3.

    Use it to let a federation cover kinds of tasks that no client has alone. Every round reports
    ``aggregation_error``: how far the product of the averages is from the average of the products,
    ``|mean(B A) - mean(B) mean(A)| / |mean(B A)|``, which Fed-SB avoids. To report it the server
    holds the adapters of a round; ``diagnose`` false keeps sums only.

    A client whose adapter has other settings is refused, with what differs. ``compact`` leaves the
    header away: a message up is the adapter's values and nothing else. A compact run takes no
    codec. The other options are FedAvg's; with ``upload`` weights one client alone is plain
    training, bit for bit.
    """

    name = "fedit"

    def __init__(
        self,
        upload: Upload = "delta",
        diagnose: bool = True,
        compact: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(upload=upload, **options)
        self.diagnose, self.compact = diagnose, compact

    def begin(self, model: nn.Module) -> Server:
        """Averages, and knows which adapter it averages."""
        return FedITServer(self, shared_tensors(model), describe_adapter(model))

    def server(self, start: Mapping[str, Tensor]) -> Server:
        """Averages, of any model: nobody's adapter is compared."""
        return FedITServer(self, start, "")

    def client(self, local: LocalTraining) -> Client:
        """Trains, if its adapter is the run's."""
        return FedITClient(local, self.upload)


class FedITServer(FedAvgServer):
    """FedAvg's server that says how inexact it is."""

    options: FedIT

    def __init__(self, options: FedIT, start: Mapping[str, Tensor], adapter: str) -> None:
        super().__init__(options, start)
        self.adapter = adapter
        self.latest: dict[str, dict[str, Tensor]] = {}
        """The clients' adapters of the newest version; of this process only."""
        self._message: tuple[Any, Payload] | None = None

    def settings(self) -> dict[str, Any]:
        """The method's, and the adapter's."""
        return {**super().settings(), "adapter": self.adapter}

    def schemas(self) -> Mapping[tuple[Direction, str], Schema]:
        """Nothing but values, if it is to be compact."""
        if not self.options.compact:
            return {}
        values = tensor_fields(self.tensors)
        return {
            ("down", "train"): Schema((*values, Field("adapter", "str"))),
            ("up", "train"): Schema(values),
        }

    def message(self, client: str, kind: str) -> Payload:
        """The present version, and what it is a version of."""
        if self._message is None or self._message[0] is not self.tensors:
            self._message = self.tensors, {**self.tensors, "adapter": self.adapter}
        return self._message[1]

    def fold(self, acc: Accumulator, update: Update) -> Accumulator:
        """Add to the sum; keep the adapter itself for the figures."""
        acc = acc or {"sum": None, "clients": {}}
        kept = dict(acc["clients"])
        if self.options.diagnose and update.examples:
            weight = 1.0 if self.options.weighting == "uniform" else float(update.examples)
            kept[update.client] = {"weight": weight, "tensors": self._adapter_of(update)}
        return {"sum": super().fold(acc["sum"], update), "clients": kept}

    def merge(self, one: Accumulator, other: Accumulator) -> Accumulator:
        """Join sums and adapters."""
        return {
            "sum": super().merge(one["sum"], other["sum"]),
            "clients": {**one["clients"], **other["clients"]},
        }

    def commit(self, acc: Accumulator) -> Mapping[str, float]:
        """Average, and report how much the average of factors misses."""
        figures = dict(super().commit(acc["sum"]))
        members = acc["clients"]
        self.latest = {name: member["tensors"] for name, member in members.items()}
        if len(self.latest) > 1:  # one alone, or a secure sum's mean, has nothing to be inexact
            weights = [member["weight"] for member in members.values()]
            error = aggregation_error(list(self.latest.values()), weights)
            if error is not None:
                figures["aggregation_error"] = error
        return figures

    def _adapter_of(self, update: Update) -> dict[str, Tensor]:
        if self.options.upload == "weights":
            return update.tensors
        return {name: self.tensors[name] + change for name, change in update.tensors.items()}


class FedITClient(LocalClient):
    """FedAvg's client that compares adapters first."""

    def run(self, ctx: ClientContext, kind: str, payload: dict[str, Value]) -> Answer:
        """Train from the adapter that was sent."""
        wanted = payload.get("adapter")
        if wanted:
            require_same_adapter(ctx.name, self.describe(ctx.model), str(wanted))
        return super().run(ctx, kind, payload)

    def describe(self, model: nn.Module) -> str:
        """What must be the same at every party."""
        return describe_adapter(model)


def aggregation_error(
    members: Sequence[Mapping[str, Tensor]], weights: Sequence[float]
) -> float | None:
    """``|mean(B A) - mean(B) mean(A)|_F / |mean(B A)|_F`` over all pairs of LoRA factors.

    ``members`` are adapters by PEFT's names, ``weights`` need not add up to 1. None where there are
    no pairs, 0 where all products are zero. No [out, in] matrix is made: the norm of a sum of
    products follows from the factors' inner products.
    """
    pairs = lora_pairs(members[0])
    if not pairs:
        return None
    shares = torch.tensor(weights, dtype=torch.float64) / math.fsum(weights)
    missed = total = 0.0
    for a, b in pairs:
        right = [member[a].to(torch.float64) for member in members]  # [r, in]
        left = [member[b].to(torch.float64) for member in members]  # [out, r]
        scaled = [share * factor for share, factor in zip(shares, left, strict=True)]
        mean_b = torch.stack(scaled).sum(0)
        mean_a = torch.einsum("k,kri->ri", shares, torch.stack(right))
        total += _square(scaled, right)
        # sum w (B - mean B)(A - mean A) is the same difference, without cancellation.
        missed += _square(
            [share * (factor - mean_b) for share, factor in zip(shares, left, strict=True)],
            [factor - mean_a for factor in right],
        )
    return math.sqrt(missed / total) if total else 0.0


def lora_pairs(tensors: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """Names of A and B of each adapted module."""
    found = [(name, name.replace(".lora_A.", ".lora_B.")) for name in sorted(tensors)]
    return [(a, b) for a, b in found if a != b and b in tensors]


def save_versions(
    model: Any, folder: str | Path, clients: bool = False
) -> Callable[[Coordinator], None]:
    """A ``watch`` that stores each version's adapter as ``folder/<version>``, in PEFT's format.

    ``clients`` stores the adapters that it is the average of, too, as ``<version>-<client>`` (needs
    ``diagnose``). What is there already is kept: a resumed run makes the same again.
    """
    folder = Path(folder)

    def watch(coordinator: Coordinator) -> None:
        server: Any = coordinator.server
        found = {f"{coordinator.version:04d}": server.tensors}
        if clients:
            for name, tensors in server.latest.items():
                safe = "".join(c if c.isalnum() or c in "-_." else f"%{ord(c):x}" for c in name)
                found[f"{coordinator.version:04d}-{safe}"] = tensors
        for name, tensors in found.items():
            if not (folder / name).exists():
                with lent(model, tensors):
                    adapters.save(model, folder / name)

    return watch


def tensor_fields(tensors: Mapping[str, Tensor]) -> tuple[Field, ...]:
    """What a schema says of these tensors."""
    return tuple(
        Field(name, _TYPES[tensors[name].dtype], tuple(tensors[name].shape))
        for name in sorted(tensors)
    )


def _square(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """``|sum of left_i right_i|_F^2`` as a trace of inner products."""
    stacked_left, stacked_right = torch.cat(list(left), 1), torch.cat(list(right), 0)
    return float(
        ((stacked_left.T @ stacked_left) * (stacked_right @ stacked_right.T)).sum().clamp(0)
    )
