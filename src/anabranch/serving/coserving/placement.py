"""Where the parts of a bypass network lie when the base model is spread over several devices.

Dependent parallelisation as in FlexLLM (Oliaro et al. 2024): the plan of the frozen
base is given, so the bypass has to fit the states of the tensors that it reads and adds to. Every
way to place its weights is enumerated, with the collectives that lead from state to state, and
costed; the cheapest is taken.

    state                  device i of d holds
    replicated             the tensor
    partitioned(tokens)    the i-th part of its rows
    partitioned(features)  the i-th part of its columns
    partial sum            a summand of the tensor

    base plan    module reads           module writes
    column       replicated             partitioned(features)     q,k,v,gate,up_proj
    row          partitioned(features)  partial sum, which an     o,down_proj
                                        all-reduce replicates
    replicated   replicated             replicated
    data         partitioned(tokens)    partitioned(tokens)

A bypass at a row-parallel module may add to the partial sum, and the base's own all-reduce merges
it for nothing. Costs are those of the forward pass, which inference tokens run too. The backward
pass mirrors its conversions. What it adds, summing the gradients of weights that every device
holds whole, happens once in an optimiser step and is not costed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Literal, get_args

from anabranch.errors import ConfigurationError
from anabranch.serving.coserving.layer_shape import (
    IA3,
    Bottleneck,
    Bypass,
    LayerShape,
    Lora,
)

BasePlan = Literal["column", "row", "replicated", "data"]
WeightPart = Literal["whole", "outputs", "inputs", "features"]
"""What a device holds of a weight: all, a slice of its outputs or inputs, or of a vector."""

MEGATRON: dict[str, BasePlan] = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), "column"),
    **dict.fromkeys(("o_proj", "down_proj"), "row"),
}
"""The usual tensor parallelism of a decoder layer (Shoeybi et al. 2019)."""


class State(Enum):
    """How a tensor [tokens, features] lies on the devices."""

    REPLICATED = "replicated"
    TOKENS = "partitioned(tokens)"
    FEATURES = "partitioned(features)"
    PARTIAL = "partial sum"


@dataclass(frozen=True)
class Site:
    """A linear module of the base, ``inputs -> outputs`` features, and its plan."""

    inputs: int
    outputs: int
    plan: BasePlan

    @classmethod
    def of(cls, shape: LayerShape, module: str) -> Site:
        """A module of a decoder layer under the usual tensor parallelism."""
        return cls(*shape.modules[module], MEGATRON[module])


@dataclass(frozen=True)
class Hardware:
    """One device and its links. The defaults are an A100 on NVLink."""

    flops: float = 3.1e14
    """Operations per second."""
    bandwidth: float = 3e11
    """Bytes per second that a device sends to the others."""
    latency: float = 1e-5
    """Seconds to start a collective."""
    memory_bandwidth: float = 2e12
    """Bytes per second between a device and its memory."""


@dataclass(frozen=True)
class Part:
    """An op of a bypass network. ``linear`` ones commute with sums."""

    name: str
    kind: Literal["linear", "scale", "activation"]
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Compute:
    """Each device runs ``part`` on what it has, with its part of the weight."""

    part: Part
    weight: WeightPart
    before: State
    after: State


@dataclass(frozen=True)
class Convert:
    """A tensor with ``features`` columns changes its state."""

    kind: str
    features: int
    before: State
    after: State


Step = Compute | Convert


@dataclass(frozen=True)
class Cost:
    """Per device, for one forward pass."""

    seconds: float
    moved: float
    """Bytes sent."""
    collectives: int
    flops: float
    memory: float
    """Bytes of weights and of tensors between the parts; what is added to belongs to the base."""


@dataclass(frozen=True)
class Candidate:
    """A way to place the bypass. ``reads`` and ``writes`` are the states at the boundary."""

    reads: State
    writes: State
    steps: tuple[Step, ...]
    cost: Cost

    @property
    def weights(self) -> dict[str, WeightPart]:
        """What a device holds of each weight."""
        return {
            step.part.name: step.weight
            for step in self.steps
            if isinstance(step, Compute) and step.part.kind != "activation"
        }

    def describe(self) -> str:
        """``A[inputs] -> partial sum -> B[whole] -> partial sum``, with collectives named."""
        words = [self.reads.value]
        for step in self.steps:
            if isinstance(step, Convert):
                words.append(f"({step.kind})")
            elif step.part.kind == "activation":
                words.append(step.part.name)
            else:
                words.append(f"{step.part.name}[{step.weight}]")
            words.append(step.after.value)
        return " -> ".join(words)


@dataclass(frozen=True)
class Placement:
    """All candidates, cheapest first. ``best`` is the one to use."""

    site: Site
    devices: int
    candidates: tuple[Candidate, ...]

    @property
    def best(self) -> Candidate:
        """The cheapest candidate; among equals the one with less memory."""
        return self.candidates[0]

    def describe(self) -> str:
        """A table of the candidates, cheapest first."""
        lines = [
            f"{self.site.plan} {self.site.inputs} -> {self.site.outputs} on {self.devices} "
            f"device{'s' if self.devices > 1 else ''}",
            f"{'us':>9} {'KB sent':>9} {'MFLOP':>9} {'KB held':>9}  steps",
        ]
        for found in self.candidates:
            cost = found.cost
            lines.append(
                f"{cost.seconds * 1e6:9.2f} {cost.moved / 1e3:9.1f} {cost.flops / 1e6:9.2f} "
                f"{cost.memory / 1e3:9.1f}  {found.describe()}"
            )
        return "\n".join(lines)


def plan_placement(
    bypass: Bypass,
    site: Site,
    devices: int,
    tokens: int,
    *,
    hardware: Hardware | None = None,
    bits: int = 16,
) -> Placement:
    """Enumerate the placements of ``bypass`` at ``site`` and order them by cost.

    ``tokens`` is the size of a step, ``bits`` that of weights and activations. A tensor is
    partitioned by features only if ``devices`` divides them.

    Raises :class:`ConfigurationError` if the base's own plan cannot be, or nothing is to be placed.
    """
    _check(site, devices, tokens, bits)
    parts = network(bypass, site)
    hardware = hardware or Hardware()
    found = [
        Candidate(reads, writes, steps, _cost(steps, devices, tokens, bits, hardware))
        for reads, writes in boundaries(bypass, site.plan, devices)
        for steps in _paths(parts, reads, writes, devices)
    ]
    return Placement(
        site,
        devices,
        tuple(sorted(found, key=lambda c: (c.cost.seconds, c.cost.memory, len(c.steps)))),
    )


def network(bypass: Bypass, site: Site) -> tuple[Part, ...]:
    """The parts of a bypass in order."""
    if isinstance(bypass, Lora):
        return (
            Part("A", "linear", site.inputs, bypass.rank),
            Part("B", "linear", bypass.rank, site.outputs),
        )
    if isinstance(bypass, Bottleneck):
        source = site.outputs if bypass.place == "series_output" else site.inputs
        down = Part("down", "linear", source, bypass.size)
        act = Part(bypass.activation, "activation", bypass.size, bypass.size)
        up = Part("up", "linear", bypass.size, site.outputs)
        return (down, up) if bypass.activation == "identity" else (down, act, up)
    if isinstance(bypass, IA3):
        width = site.inputs if bypass.on == "input" else site.outputs
        return (Part("scale", "scale", width, width),)
    raise ConfigurationError("a trained bias lies where the base's own bias does: nothing to place")


def boundaries(bypass: Bypass, plan: BasePlan, devices: int) -> tuple[tuple[State, State], ...]:
    """Pairs of states in which the bypass may read and write, so that the base need not change."""
    if devices == 1:
        return ((State.REPLICATED, State.REPLICATED),)
    before = {"row": State.FEATURES, "data": State.TOKENS}.get(plan, State.REPLICATED)
    after = {
        "column": (State.FEATURES,),
        "row": (State.PARTIAL, State.REPLICATED),
        "replicated": (State.REPLICATED,),
        "data": (State.TOKENS,),
    }[plan]
    if isinstance(bypass, IA3) and bypass.on == "input":
        return ((before, before),)
    if isinstance(bypass, IA3) or (
        isinstance(bypass, Bottleneck) and bypass.place == "series_output"
    ):
        # Read before the all-reduce and written after it, the output would be summed twice.
        return tuple((state, state) for state in after)
    return tuple((before, state) for state in after)


CONVERSIONS: dict[tuple[State, State], str] = {
    (State.REPLICATED, State.TOKENS): "slice",
    (State.REPLICATED, State.FEATURES): "slice",
    (State.REPLICATED, State.PARTIAL): "mask",  # all but the first device hold zeros
    (State.TOKENS, State.REPLICATED): "all-gather",
    (State.TOKENS, State.FEATURES): "all-to-all",
    (State.TOKENS, State.PARTIAL): "pad",  # with zeros, to full size
    (State.FEATURES, State.REPLICATED): "all-gather",
    (State.FEATURES, State.TOKENS): "all-to-all",
    (State.FEATURES, State.PARTIAL): "pad",
    (State.PARTIAL, State.REPLICATED): "all-reduce",
    (State.PARTIAL, State.TOKENS): "reduce-scatter",
    (State.PARTIAL, State.FEATURES): "reduce-scatter",
}
_LINEAR: tuple[tuple[WeightPart, State, State], ...] = (
    ("whole", State.REPLICATED, State.REPLICATED),
    ("whole", State.TOKENS, State.TOKENS),
    ("whole", State.PARTIAL, State.PARTIAL),
    ("outputs", State.REPLICATED, State.FEATURES),
    ("inputs", State.FEATURES, State.PARTIAL),
)
_SCALE: tuple[tuple[WeightPart, State, State], ...] = (
    ("whole", State.REPLICATED, State.REPLICATED),
    ("whole", State.TOKENS, State.TOKENS),
    ("whole", State.PARTIAL, State.PARTIAL),
    ("features", State.FEATURES, State.FEATURES),
)
_ACTIVATION: tuple[tuple[WeightPart, State, State], ...] = (  # not linear: no partial sums
    ("whole", State.REPLICATED, State.REPLICATED),
    ("whole", State.TOKENS, State.TOKENS),
    ("whole", State.FEATURES, State.FEATURES),
)
_WAYS = {"linear": _LINEAR, "scale": _SCALE, "activation": _ACTIVATION}


def sent(kind: str, size: float, devices: int) -> float:
    """Bytes that each device sends in a ring collective on a tensor of ``size`` bytes."""
    share = (devices - 1) / devices
    return {
        "all-gather": share * size,
        "reduce-scatter": share * size,
        "all-reduce": 2 * share * size,
        "all-to-all": share * size / devices,
    }.get(kind, 0.0)


def _paths(
    parts: tuple[Part, ...], state: State, end: State, devices: int
) -> Iterator[tuple[Step, ...]]:
    """All sequences of steps through ``parts`` from one state to another."""
    part, rest = parts[0], parts[1:]
    for weight, before, after in _WAYS[part.kind]:
        if not (
            _possible(before, part.inputs, devices) and _possible(after, part.outputs, devices)
        ):
            continue
        step = Compute(part, weight, before, after)
        head: tuple[Step, ...] = (*_convert(part.inputs, state, before), step)
        if rest:
            for tail in _paths(rest, after, end, devices):
                yield (*head, *tail)
        else:
            yield (*head, *_convert(part.outputs, after, end))


def _convert(features: int, before: State, after: State) -> tuple[Convert, ...]:
    if before is after:
        return ()
    return (Convert(CONVERSIONS[before, after], features, before, after),)


def _possible(state: State, features: int, devices: int) -> bool:
    if devices == 1:
        return state is State.REPLICATED
    return state is not State.FEATURES or features % devices == 0


def _cost(
    steps: tuple[Step, ...], devices: int, tokens: int, bits: int, hardware: Hardware
) -> Cost:
    def rows(state: State) -> int:
        return -(-tokens // devices) if state is State.TOKENS else tokens

    def columns(features: int, state: State) -> int:
        return features // devices if state is State.FEATURES else features

    element = bits / 8
    moved = flops = memory = 0.0
    collectives = 0
    for index, step in enumerate(steps):
        last = index == len(steps) - 1
        if isinstance(step, Convert):
            moved += sent(step.kind, tokens * step.features * element, devices)
            collectives += step.kind not in ("slice", "mask", "pad")
            made = step.features
        else:
            wide, narrow = (
                columns(step.part.inputs, step.before),
                columns(step.part.outputs, step.after),
            )
            elementwise = step.part.kind != "linear"
            flops += rows(step.before) * narrow * (1 if elementwise else 2 * wide)
            if step.part.kind != "activation":
                memory += narrow * (1 if elementwise else wide) * element
            made = step.part.outputs
        if not last:
            memory += rows(step.after) * columns(made, step.after) * element
    seconds = (
        flops / hardware.flops
        + moved / hardware.bandwidth
        + collectives * hardware.latency
        + memory / hardware.memory_bandwidth
    )
    return Cost(seconds, moved, collectives, flops, memory)


def _check(site: Site, devices: int, tokens: int, bits: int) -> None:
    if site.plan not in get_args(BasePlan):
        raise ConfigurationError(
            f"a base plan is one of {', '.join(get_args(BasePlan))}, not {site.plan!r}"
        )
    if min(devices, tokens, bits) < 1:
        raise ConfigurationError(
            f"devices, tokens and bits must be at least 1, not {devices}, {tokens} and {bits}"
        )
    split = {"column": site.outputs, "row": site.inputs}.get(site.plan)
    if split is not None and split % devices:
        raise ConfigurationError(
            f"a {site.plan}-parallel module splits {split} features, which {devices} devices do "
            f"not divide"
        )
