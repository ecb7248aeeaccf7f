"""Fed-SB: only the small matrix between two frozen factors is trained, sent and averaged."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from anabranch.adapters import lora_sb
from anabranch.adapters.errors import AdapterMismatch
from anabranch.errors import ConfigurationError
from anabranch.federated.adapter_agreement import describe_adapter, require_same_adapter
from anabranch.federated.client import Answer, Client, ClientContext
from anabranch.federated.errors import EmptyRound, PayloadMismatch
from anabranch.federated.local import LocalTraining
from anabranch.federated.messages import Reply
from anabranch.federated.payload import Payload, Value
from anabranch.federated.scheduling import Sampler, Schedule
from anabranch.federated.seeded_model import digest
from anabranch.federated.server import Accumulator, Server, ServerContext, Update
from anabranch.federated.strategies.base import Strategy
from anabranch.federated.strategies.first_gradient import Sketch, first_gradient, sum_of_sketches
from anabranch.federated.strategies.warm_up import WarmUp
from anabranch.federated.wire import Direction, Field, Schema
from anabranch.training.hooks import Hook
from anabranch.training.trainer import Trainer

logger = logging.getLogger(__name__)

Init = Literal["federated", "public", "random"]
Weighting = Literal["examples", "uniform"]


class FedSB(Strategy):
    """Averages R in ``W + B R A`` with B and A frozen: exact, and r^2 numbers a module.

    Singhal et al. 2025, "Fed-SB: A Silver Bullet for Extreme Communication Efficiency and
    Performance in (Private) Federated LoRA Fine-Tuning", section 4.

    Use it for adapters over thin links, and for private training: noise enters once, linearly, and
    in few numbers. The adapter's method is ``lora_sb``. ``init`` says where B and A come from, the
    best rank-r form of a first step ``-init_lr * sign(G)``:

    - ``federated``: the first version is made of the clients' gradients G, each over
      ``init_samples`` of its examples (a private batch where training is private); B and A are much
      worse of few. A client sends a ``low_rank`` ``sketch`` of 2 r columns, or whole where that is
      less, or counts of ``signs``, a byte a weight. B and A then go to every client once.
    - ``public``: those of the server's model, which :func:`~anabranch.adapters.lora_sb.initialise`
      has made from examples of its own; they go to every client once.
    - ``random``: drawn by the adapter's seed, the same everywhere; R begins at zero. Much weaker.

    ``ranks`` gives some clients a smaller rank: they hold the leading block of R, whose directions
    carry most of the first step. An entry is averaged over the clients that have it.

    ``compact`` leaves headers away: 4 r^2 bytes a module up, and 8 more in all down. It takes no
    codec. What is late counts as in :class:`FedAvg`.
    """

    name = "fed-sb"
    private = True
    adapter = "lora_sb"

    def __init__(
        self,
        init: Init = "federated",
        init_samples: int = 128,
        init_lr: float = 1e-3,
        sketch: Sketch = "low_rank",
        weighting: Weighting = "examples",
        ranks: Mapping[str, int] | None = None,
        staleness: float = 0.5,
        compact: bool = False,
    ) -> None:
        for name, value, known in (
            ("init", init, ("federated", "public", "random")),
            ("sketch", sketch, ("low_rank", "signs")),
            ("weighting", weighting, ("examples", "uniform")),
        ):
            if value not in known:
                raise ConfigurationError(f"{name} is {' or '.join(known)}, not {value!r}")
        if init_samples < 1:
            raise ConfigurationError(f"init_samples is at least 1, not {init_samples}")
        if not (init_lr > 0 and math.isfinite(init_lr)):
            raise ConfigurationError(f"init_lr is above 0 and finite, not {init_lr}")
        if not staleness >= 0:
            raise ConfigurationError(f"staleness is an exponent of at least 0, not {staleness}")
        for client, rank in (ranks or {}).items():
            if rank < 1:
                raise ConfigurationError(f"the rank of {client} is at least 1, not {rank}")
        self.init: Init = init
        self.sketch: Sketch = sketch
        self.weighting: Weighting = weighting
        self.init_samples, self.init_lr = init_samples, init_lr
        self.ranks = dict(ranks or {})
        self.staleness, self.compact = staleness, compact

    def begin(self, model: nn.Module) -> Server:
        """Averages R; holds B and A."""
        return FedSBServer(self, model)

    def server(self, start: Mapping[str, Tensor]) -> Server:
        """Only :meth:`begin` can: what is trained does not say what B and A are."""
        raise ConfigurationError(f"{self.name} needs the model: call begin(model)")

    def client(self, local: LocalTraining) -> Client:
        """Trains R."""
        return FedSBClient(self, local)

    def schedule(self, rounds: int, sampler: Sampler | None = None) -> Schedule:
        """Everyone in the first round if it makes B and A."""
        if self.init == "federated":
            return WarmUp.of(rounds, sampler)
        return super().schedule(rounds, sampler)

    def rank_of(self, client: str, most: int) -> int:
        """A client's rank."""
        return min(self.ranks.get(client, most), most)


class FedSBServer(Server):
    """R of every module, B and A."""

    associative = True

    def __init__(self, options: FedSB, model: nn.Module) -> None:
        self.options = options
        self.adapter = describe_adapter(model)
        self.places = lora_sb.places(model)
        parameters = dict(model.named_parameters())
        self.cores = {place.core: parameters[place.core].detach().clone() for place in self.places}
        """R by name, [r, r]. Replaced as a whole, never changed."""
        self.rank = len(next(iter(self.cores.values())))
        self.factors = lora_sb.factors(model)
        """A and B by name."""
        self.ready = options.init != "federated"
        """Whether B and A are those of the run."""
        if options.init == "public" and not any(core.any() for core in self.cores.values()):
            raise ConfigurationError(
                "init: public takes B, R and A of the server's model, whose R is zero: call "
                "adapters.lora_sb.initialise on it first"
            )
        if too_large := {c: r for c, r in options.ranks.items() if r > self.rank}:
            raise ConfigurationError(f"ranks above the adapter's {self.rank}: {too_large}")
        self._known: tuple[Any, int] | None = None

    def setup(self, ctx: ServerContext) -> None:
        """Log whose rank was given and who is not there: a name may be misspelt, or come later."""
        if absent := sorted(self.options.ranks.keys() - ctx.clients.keys()):
            logger.warning(
                "ranks are given for %s, who are not there; there are %s",
                ", ".join(absent),
                ", ".join(sorted(ctx.clients)),
            )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The present version: R, B and A by name."""
        return {**self.cores, **self.factors}

    @property
    def factors_id(self) -> int:
        """Names B, A and the adapter's settings; 0 while there are none."""
        if not self.ready:
            return 0
        if self._known is None or self._known[0] is not self.factors:
            self._known = self.factors, digest(self.factors)
        return self._known[1]

    def settings(self) -> dict[str, Any]:
        """The method's, and the adapter's."""
        given = {} if self.options.init == "federated" else {"factors": self.factors_id}
        options = {"strategy": self.options.name, **vars(self.options)}
        return {**options, "adapter": self.adapter, **given}

    def schemas(self) -> Mapping[tuple[Direction, str], Schema]:
        """Values only, if it is to be compact."""
        if not self.options.compact:
            return {}
        core = Field("R", "f32", (-1,))
        return {
            ("down", "train"): Schema((Field("factors", "int"), core)),
            ("up", "train"): Schema((core,)),
        }

    def message(self, client: str, kind: str) -> Payload:
        """R for training; with ``factors`` also B and A; for ``init`` what is to be adapted."""
        if kind == "init":
            return {"adapter": self.adapter}
        payload: dict[str, Value] = {"factors": self.factors_id, "R": torch.empty(0)}
        if self.ready:
            rank = self.options.rank_of(client, self.rank)
            payload["R"] = flat_blocks(self.cores, rank)
        if kind == "factors":
            payload["adapter"] = self.adapter
            if self.options.init != "random":
                payload |= self.factors
        return payload

    def respond(self, reply: Reply, payload: Payload) -> str | None:
        """Whoever sends no R lacks B and A: ask for its gradient, or send them."""
        if reply.kind == "init":
            if self.ready:
                return "factors"
            sum_of_sketches(None, payload, self.places, 1.0, reply.client)  # checks it
            return None
        core = payload.get("R")
        if core is None or (isinstance(core, Tensor) and not core.numel()):
            if reply.kind == "factors":
                raise PayloadMismatch(reply.client, "R", "values", "absent")
            return "factors" if self.ready else "init"
        wanted = self.options.rank_of(reply.client, self.rank) ** 2 * len(self.cores)
        if not isinstance(core, Tensor) or core.dim() != 1 or len(core) != wanted:
            got = list(core.shape) if isinstance(core, Tensor) else type(core).__name__
            raise PayloadMismatch(reply.client, "R", f"{wanted} values", str(got))
        return None

    def fold(self, acc: Accumulator, update: Update) -> Accumulator:
        """Add a gradient's sketch, or a weighted change of R to the entries that the client has."""
        weight = float(update.examples)
        if self.options.weighting == "uniform":
            weight = min(weight, 1.0)
        if update.kind == "init":
            if not weight:
                return acc
            return sum_of_sketches(acc, update.payload, self.places, weight, update.client)
        rank = self.options.rank_of(update.client, self.rank)
        change = blocks_of(update.tensors["R"], self.cores, rank)
        discount = (1 + update.staleness) ** -self.options.staleness
        acc = acc or {
            "sums": {n: torch.zeros_like(c, dtype=torch.float64) for n, c in self.cores.items()},
            "weights": torch.zeros(self.rank, self.rank, dtype=torch.float64),
        }
        sums = {n: s + weight * discount * change[n].double() for n, s in acc["sums"].items()}
        owned = torch.zeros_like(acc["weights"])
        owned[:rank, :rank] = weight
        return {"sums": sums, "weights": acc["weights"] + owned}

    def merge(self, one: Accumulator, other: Accumulator) -> Accumulator:
        """Add."""
        sums = {name: one["sums"][name] + other["sums"][name] for name in one["sums"]}
        return {"sums": sums, "weights": one["weights"] + other["weights"]}

    def commit(self, acc: Accumulator) -> Mapping[str, float]:
        """Move R by its mean change, or make B, R and A of the first gradients."""
        if acc is None or not bool((torch.as_tensor(acc["weights"]) > 0).any()):
            raise EmptyRound("no client has an example; the model stays as it was")
        if not self.ready:
            return self._initialise(acc["sums"])
        weights = acc["weights"]
        self.cores = {
            name: core + (acc["sums"][name] / weights.clamp(min=1e-300)).to(core.dtype)
            for name, core in self.cores.items()
        }
        return {}

    def _initialise(self, gradients: Mapping[str, Tensor]) -> Mapping[str, float]:
        for place in self.places:
            lora_sb.require_subspace(place.site, gradients[place.site])
        cores, factors = {}, {}
        for place in self.places:
            b, core, a = lora_sb.first_step(gradients[place.site], self.rank, self.options.init_lr)
            cores[place.core], factors[place.a], factors[place.b] = core, a, b
        self.cores, self.factors, self.ready = cores, factors, True
        return {}

    def state_dict(self) -> dict[str, Any]:
        """R, B and A."""
        return {"cores": self.cores, "factors": self.factors, "ready": self.ready}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self.cores, self.factors = dict(state["cores"]), dict(state["factors"])
        self.ready = bool(state["ready"])


class FedSBClient(Client):
    """Trains R between the B and A that it was sent, which it keeps."""

    def __init__(self, options: FedSB, local: LocalTraining) -> None:
        self.options = options
        self.local = local

    def setup(self, ctx: ClientContext) -> None:
        """Note which B and A are here."""
        ctx.state["held"] = digest(lora_sb.factors(ctx.model))
        ctx.state["factors"] = {}

    def run(self, ctx: ClientContext, kind: str, payload: dict[str, Value]) -> Answer:
        """The change of R; nothing if B and A are not here; a sketch of the first gradient."""
        if kind != "train":
            require_same_adapter(ctx.name, describe_adapter(ctx.model), str(payload["adapter"]))
        # An exchange is only taken up again after a crash if there is something to remember of it.
        ctx.exchange["kind"] = kind
        if kind == "init":
            return first_gradient(ctx, self.local, self.options.init_samples, self.options.sketch)
        if kind == "factors":
            self._keep(ctx, payload)
        if ctx.state["held"] != payload["factors"]:
            return ({"R": torch.empty(0)} if self.options.compact else {}), 0
        ctx.exchange.clear()
        places = lora_sb.places(ctx.model)
        parameters = dict(ctx.model.named_parameters())
        like = {place.core: parameters[place.core] for place in places}
        rank = self.options.rank_of(ctx.name, len(like[places[0].core]))
        sent = payload["R"]
        assert isinstance(sent, Tensor)
        cores = blocks_of(sent, like, rank)
        hooks = [_LeadingBlock(rank)] if rank < len(like[places[0].core]) else []
        result = self.local.run(ctx, {**cores, **ctx.state["factors"]}, hooks)
        change = {name: result.tensors[name] - core for name, core in cores.items()}
        return {"R": flat_blocks(change, rank)}, result.examples

    def _keep(self, ctx: ClientContext, payload: Mapping[str, Value]) -> None:
        names = lora_sb.factors(ctx.model)
        received = {n: v for n, v in payload.items() if n in names and isinstance(v, Tensor)}
        held = digest(received or names)
        if held != payload["factors"]:
            raise AdapterMismatch(
                f"{ctx.name} holds other frozen factors than the run ({held:012x}, not "
                f"{int(str(payload['factors'])):012x}): R means something else between them"
            )
        ctx.state["held"], ctx.state["factors"] = held, received


class _LeadingBlock(Hook):
    """Entries beyond a smaller client's rank are not trained: they stay zero."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def after_gradients(self, trainer: Trainer[Any]) -> None:
        """Their gradients are zero, so that no optimiser moves a zero."""
        for parameter in trainer.trainable.values():
            if parameter.grad is not None:
                parameter.grad[self.rank :] = 0
                parameter.grad[:, self.rank :] = 0


def flat_blocks(cores: Mapping[str, Tensor], rank: int) -> Tensor:
    """The leading ``rank`` x ``rank`` blocks in the order of names, one vector."""
    return torch.cat([cores[name][:rank, :rank].reshape(-1) for name in sorted(cores)])


def blocks_of(vector: Tensor, like: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Matrices of the shape of ``like`` with these leading blocks, zero elsewhere."""
    found = {}
    for name, block in zip(sorted(like), vector.reshape(-1, rank, rank), strict=True):
        found[name] = torch.zeros(like[name].shape, dtype=vector.dtype)
        found[name][:rank, :rank] = block
    return found
