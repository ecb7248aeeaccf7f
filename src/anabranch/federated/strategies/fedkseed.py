"""FedKSeed: full-parameter tuning with messages of a few kilobytes, whatever the model's size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anabranch.errors import ConfigurationError
from anabranch.federated.client import Answer, Client, ClientContext
from anabranch.federated.errors import EmptyRound, PayloadError
from anabranch.federated.local import LocalTraining
from anabranch.federated.messages import Reply
from anabranch.federated.payload import Payload, Value
from anabranch.federated.randomness import derive_seed
from anabranch.federated.seeded_model import (
    PooledModel,
    digest,
    require_same_base,
    to_units,
)
from anabranch.federated.server import Accumulator, Server, ServerContext, Update
from anabranch.federated.shared import shared_tensors
from anabranch.federated.slopes import Slopes, require_plain
from anabranch.federated.strategies.base import Strategy
from anabranch.federated.wire import Direction, Field, Schema

_STEP = np.dtype([("index", "<u2"), ("slope", "<f4")])
"""What a client says of a local step: 6 bytes."""
_STEEPEST = 1000.0
"""Slopes count no more than this for the chances of FedKSeed-Pro, as in the authors' code."""


class FedKSeed(Strategy):
    """Zeroth-order steps along ``k`` shared directions; only scalars travel (Qin et al. ICML 2024).

    "Federated Full-Parameter Tuning of Billion-Sized Language Models with Communication Cost under
    18 Kilobytes", section 3.2.

    Use it where a link is thin and the model large: a client and round cost ``4 k`` bytes down and
    6 a step up. It needs many more steps than gradients do, and a small ``lr``.

    The model is always ``base - lr * sum_j A_j z_j``. Clients rebuild it from A, take the steps
    that the job's ``local`` section says (its optimiser and rate are not used), and send index and
    slope of each. ``eps`` is how far losses are apart. ``clip`` leaves out steps whose two losses
    differ by more. ``weighting`` is by ``examples`` or ``uniform``.

    Known problem: steps whose loss is NaN are left out, and counted under ``skipped``.
    """

    name = "fedkseed"
    pro = False

    def __init__(
        self,
        k: int = 1024,
        lr: float = 0.01,
        eps: float = 1e-3,
        clip: float | None = None,
        weighting: str = "examples",
    ) -> None:
        if not 1 <= k <= 2**16:
            raise ConfigurationError(f"k is from 1 to 65,536 directions, not {k}")
        for name, value in (("lr", lr), ("eps", eps), ("clip", 1.0 if clip is None else clip)):
            if not (value > 0 and math.isfinite(value)):
                raise ConfigurationError(f"{name} is above 0 and finite, not {value}")
        if weighting not in ("examples", "uniform"):
            raise ConfigurationError(f"weighting is examples or uniform, not {weighting!r}")
        self.k, self.lr, self.eps, self.clip, self.weighting = k, lr, eps, clip, weighting

    def server(self, start: Mapping[str, Tensor]) -> Server:
        """Keeps the scalars."""
        return FedKSeedServer(self, start)

    def client(self, local: LocalTraining) -> Client:
        """Rebuilds the model from scalars, and steps."""
        require_plain(local, self.name)
        return FedKSeedClient(self, local)


class FedKSeedPro(FedKSeed):
    """FedKSeed that draws steep directions more often (Qin et al. ICML 2024, section 3.3).

    Meant for small pools. A message down has the chances, too: ``8 k`` bytes. Options are
    FedKSeed's.
    """

    name = "fedkseed-pro"
    pro = True


class FedKSeedServer(Server):
    """The scalar of each direction, and how steep it was. Needs the model only to show it."""

    associative = True

    def __init__(self, options: FedKSeed, start: Mapping[str, Tensor]) -> None:
        self.options = options
        self.start = start
        self.base = digest(start)
        self.scalars = np.zeros(options.k)  # float64
        self.times = np.ones(options.k)  # every history begins with one slope of 0
        self.steepness = np.zeros(options.k)
        self._shown: PooledModel | None = None

    def setup(self, ctx: ServerContext) -> None:
        """Name the pool."""
        self.pool = derive_seed(ctx.seed, "fedkseed")

    def settings(self) -> dict[str, Any]:
        """The method's, and the base."""
        return {"strategy": self.options.name, **vars(self.options), "base": self.base}

    def schemas(self) -> Mapping[tuple[Direction, str], Schema]:
        """Nothing but the values."""
        rows = 2 if self.options.pro else 1
        down = (
            Field("base", "int"),
            Field("pool", "int"),
            Field("scalars", "f32", (rows, self.options.k)),
        )
        return {
            ("down", "train"): Schema(down),
            ("up", "train"): Schema((Field("steps", "bytes"),)),
        }

    def message(self, client: str, kind: str) -> Payload:
        """Scalars [1, k], or scalars and chances [2, k]."""
        rows = [self.scalars, self.chances()] if self.options.pro else [self.scalars]
        scalars = torch.from_numpy(np.stack(rows).astype(np.float32))
        return {"base": self.base, "pool": self.pool, "scalars": scalars}

    def chances(self) -> NDArray[np.float64]:
        """How likely each direction is drawn [k]: softmax of mean steepness, scaled to [0, 1]."""
        mean = self.steepness / self.times
        scaled = (mean - mean.min()) / (mean.max() - mean.min() + 1e-10)
        raised = np.exp(scaled)
        return raised / raised.sum()

    def respond(self, reply: Reply, payload: Payload) -> str | None:
        """Refuse what cannot be a list of steps."""
        steps = _steps_of(payload)
        if (steps["index"] >= self.options.k).any():
            raise PayloadError(
                f"{reply.client} stepped along direction {steps['index'].max()} of a pool of "
                f"{self.options.k}"
            )
        if not np.isfinite(steps["slope"]).all():
            raise PayloadError(f"{reply.client} reports a slope that is NaN or infinite")
        return None

    def fold(self, acc: Accumulator, update: Update) -> Accumulator:
        """Add weighted scalars [k], times drawn [k] and steepness [k], by :meth:`merge`."""
        steps = _steps_of(update.payload)
        weight = update.examples if self.options.weighting == "examples" else 1
        if not (len(steps) and update.examples):
            weight = 0
        slopes = steps["slope"].astype(np.float64)
        columns = (weight * slopes, np.ones(len(steps)), np.abs(slopes).clip(max=_STEEPEST))
        added = [np.bincount(steps["index"], column, self.options.k) for column in columns]
        mine = {"weight": float(weight), "added": torch.from_numpy(np.stack(added))}
        return mine if acc is None else self.merge(acc, mine)

    def merge(self, one: Accumulator, other: Accumulator) -> Accumulator:
        """Add."""
        return {key: one[key] + other[key] for key in one}

    def commit(self, acc: Accumulator) -> Mapping[str, float]:
        """``A += sum_i w_i a_i / sum_i w_i``."""
        if not acc["weight"]:
            raise EmptyRound("no client took a step; the model stays as it was")
        weighted, times, steepness = acc["added"].numpy()
        scalars = self.scalars + weighted / acc["weight"]
        to_units(scalars)  # refuses a model that has diverged
        self.scalars = scalars
        self.times, self.steepness = self.times + times, self.steepness + steepness
        return {"directions": float(np.count_nonzero(self.scalars))}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The model of this version, as every client rebuilds it."""
        if self._shown is None or self._shown.pool != self.pool:
            self._shown = PooledModel(self.start, self.options.lr, self.pool, self.options.k)
        self._shown.move_to(to_units(self.scalars.astype(np.float32)))
        return self._shown.tensors

    def state_dict(self) -> dict[str, Any]:
        """Three numbers a direction; the model follows from them."""
        kept = np.stack([self.scalars, self.times, self.steepness])
        return {"pool": torch.from_numpy(kept)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self.scalars, self.times, self.steepness = state["pool"].numpy().copy()


class FedKSeedClient(Client):
    """Local steps ``w -= lr g z``, each along a direction of the pool."""

    def __init__(self, options: FedKSeed, local: LocalTraining) -> None:
        self.options = options
        self.local = local
        # Follows from base and scalars to the bit, so that sites may share it and a crash lose it.
        self._replica: tuple[int, PooledModel] | None = None

    def setup(self, ctx: ClientContext) -> None:
        """Note which base weights are here."""
        ctx.state["base"] = digest(shared_tensors(ctx.model))

    def run(self, ctx: ClientContext, kind: str, payload: dict[str, Value]) -> Answer:
        """Index and slope of each step."""
        require_same_base(ctx.name, ctx.state["base"], _int(payload, "base"))
        scalars, *chances = payload["scalars"].numpy()  # type: ignore[union-attr]
        replica = self._rebuilt(ctx, _int(payload, "pool"), scalars)
        slopes = Slopes(ctx, self.local, self.options.eps)
        indices = _draw(ctx.rng, self.options.k, slopes.steps, chances[0] if chances else None)
        steps, losses = [], []
        with replica.lend(ctx.model):
            for index in indices.tolist():
                slope = slopes.along(replica, ctx.model, replica.seed(index), slopes.next_batch())
                if self._usable(slope.value):
                    scalar = np.float32(slope.value * ctx.work.lr_scale)
                    replica.step(index, int(to_units([float(scalar)])[0]))
                    steps.append((index, scalar))
                    losses.append(slope.loss)
        ctx.spend(len(indices))
        if losses:
            ctx.report(loss=math.fsum(losses) / len(losses))
        if len(steps) < len(indices):
            ctx.report(skipped=len(indices) - len(steps))
        examples = len(slopes.items) if steps else 0
        return {"steps": np.array(steps, dtype=_STEP).tobytes()}, examples

    def _rebuilt(self, ctx: ClientContext, pool: int, scalars: NDArray[np.float32]) -> PooledModel:
        if self._replica is None or self._replica[0] != ctx.state["base"]:
            start = shared_tensors(ctx.model)
            self._replica = (
                ctx.state["base"],
                PooledModel(start, self.options.lr, pool, self.options.k),
            )
        replica = self._replica[1]
        if replica.pool != pool:
            replica = PooledModel(replica.start, self.options.lr, pool, self.options.k)
            self._replica = ctx.state["base"], replica
        replica.move_to(to_units(scalars))
        return replica

    def _usable(self, slope: float) -> bool:
        apart = abs(slope) * 2 * self.options.eps
        return math.isfinite(slope) and (self.options.clip is None or apart <= self.options.clip)


def _draw(
    rng: np.random.Generator, k: int, count: int, chances: NDArray[np.float32] | None
) -> NDArray[np.int64]:
    if chances is None:
        return rng.integers(0, k, count)
    wide = chances.astype(np.float64)
    return rng.choice(k, count, p=wide / wide.sum())


def _steps_of(payload: Payload) -> NDArray[np.void]:
    steps = payload.get("steps")
    if not isinstance(steps, bytes) or len(steps) % _STEP.itemsize:
        raise PayloadError(f"the reply is no list of steps of {_STEP.itemsize} bytes")
    return np.frombuffer(steps, dtype=_STEP)


def _int(payload: Mapping[str, Value], name: str) -> int:
    value = payload[name]
    assert isinstance(value, int)
    return value
