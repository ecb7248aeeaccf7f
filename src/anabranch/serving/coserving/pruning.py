"""What a fine-tuning step must keep of the forward pass, decided before it runs.

Graph pruning and rematerialisation as in FlexLLM (Oliaro et al. 2024), on the op graph
of one layer (:mod:`.layer_graph`).

1. *Needed gradients.* A value's gradient is needed if the value depends on a trained parameter
   and the loss depends on the value. Nothing below the lowest adapted layer qualifies.
2. *Pruning.* A tensor is kept if a needed gradient reads it.
3. *Rematerialisation.* Of those, a tensor is dropped again if the other ones give it back by cheap
   ops. Recipes only lead forward, so that all such tensors can be dropped at once and the
   remaining set is the only minimal one.

    gate --silu--> act --*--> product --> down_proj     gradients read gate, up, act and, if
    up  -----------------'                              down_proj is adapted, product;
                                                        gate and up give act and product back

Counted are the tensors that wait for the backward pass. Not counted: weights, optimiser state, the
gradients themselves (about one layer's activations in any mode), and the allocator's rounding.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from anabranch.errors import ConfigurationError
from anabranch.serving.coserving.layer_graph import (
    LayerGraph,
    Style,
    Value,
    head_graph,
    layer_graph,
)
from anabranch.serving.coserving.layer_shape import Bypass, LayerShape

Mode = Literal["conventional", "autograd", "pruned", "pruned+remat", "layer_input"]
"""
============ =================================================================================
conventional every tensor that the forward pass makes, as a static graph for full training does
autograd     what PyTorch saves for the Hugging Face model with a frozen base
pruned       what the needed gradients read
pruned+remat the same, less what is a cheap op away from the rest
layer_input  input, rotated keys and values of each layer; the rest is computed again, one layer
             and window at a time, under autograd
============ =================================================================================
"""


@dataclass(frozen=True)
class LayerPlan:
    """One layer's values by what becomes of them, each with its reason."""

    kept: Mapping[str, str]
    rematerialised: Mapping[str, str]
    dropped: Mapping[str, str]


@dataclass(frozen=True)
class Entry:
    """What becomes of a tensor in ``layers``."""

    value: Value
    layers: tuple[int, ...]
    why: str
    """In the topmost of them; lower layers need the same gradients or fewer."""


@dataclass(frozen=True)
class MemoryPlan:
    """Activations of a sequence of ``tokens`` between its forward and its backward pass."""

    mode: Mode
    tokens: int
    window: int
    """Tokens that pass the head, or a backward unit, at a time."""
    kept: tuple[Entry, ...]
    rematerialised: tuple[Entry, ...]
    dropped: tuple[Entry, ...]
    head: tuple[Value, ...]
    """Kept for final norm and loss."""

    @property
    def layer_bytes(self) -> int:
        """Of all layers together; what they share counts once."""
        return sum(
            entry.value.bytes(self.tokens) * (1 if entry.value.shared else len(entry.layers))
            for entry in self.kept
        )

    @property
    def head_bytes(self) -> int:
        """The last hidden states and labels of the sequence, the rest for one window."""
        return sum(
            value.bytes(self.tokens if value.name in ("x", "labels") else self.window)
            for value in self.head
        )

    @property
    def bytes(self) -> int:
        """Everything that waits for the backward pass."""
        return self.layer_bytes + self.head_bytes

    @property
    def bytes_per_token(self) -> float:
        """Layers only; without flash attention it depends on ``tokens``."""
        return self.layer_bytes / self.tokens

    @property
    def workspace_bytes(self) -> int:
        """What the backward pass makes again: the worst layer's tensors, for one window."""
        per_layer: dict[int, int] = {}
        for entry in self.rematerialised:
            for layer in entry.layers:
                size = entry.value.bytes(self.window, self.tokens)
                per_layer[layer] = per_layer.get(layer, 0) + size
        return max(per_layer.values(), default=0)

    def describe(self) -> str:
        """A table: each tensor of a layer with shape, bytes, layers and the reason."""
        rows = [("tensor", "shape", "bytes/layer", "layers", "")]
        for state, entries in (
            ("kept", self.kept),
            ("made again", self.rematerialised),
            ("dropped", self.dropped),
        ):
            rows += [
                (
                    entry.value.name,
                    entry.value.shape,
                    f"{entry.value.bytes(self.tokens):,}",
                    _ranges(entry.layers),
                    f"{state}: {entry.why}",
                )
                for entry in entries
            ]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:>{widths[2]}}  "
            f"{row[3]:<{widths[3]}}  {row[4]}".rstrip()
            for row in rows
        ]
        summary = (
            f"{self.mode}, {self.tokens} tokens: {self.bytes:,} bytes = layers "
            f"{self.layer_bytes:,} + head {self.head_bytes:,} (window of {self.window}); "
            f"workspace {self.workspace_bytes:,}"
        )
        return "\n".join([*lines, summary])


def plan_activations(
    model: LayerShape | Any,
    targets: Mapping[str, Bypass],
    mode: Mode,
    tokens: int,
    *,
    window: int | None = None,
    layers: Iterable[int] | None = None,
    bits: int = 16,
    flash: bool = True,
) -> MemoryPlan:
    """Plan the activations of one sequence.

    ``model`` is a :class:`LayerShape` or a Hugging Face config that :meth:`LayerShape.of` knows.
    ``targets`` maps module names to bypass networks, ``layers`` are the adapted ones (default:
    all), ``bits`` is the size of an activation. ``window`` None passes the whole sequence at once.

    Raises :class:`ConfigurationError` if nothing is trained or a number is out of range.
    """
    shape = model if isinstance(model, LayerShape) else LayerShape.of(model)
    adapted = frozenset(range(shape.layers) if layers is None else layers)
    window = min(tokens, window if window is not None else tokens)
    _check(shape, targets, mode, tokens, window, adapted)
    style: Style = "pytorch" if mode in ("autograd", "layer_input") else "planned"

    entries: dict[str, dict[Value, list[int]]] = {state: {} for state in _STATES}
    reasons: dict[tuple[str, Value], str] = {}
    plans: dict[tuple[bool, bool, bool], tuple[LayerGraph, LayerPlan]] = {}
    for layer in range(shape.layers):
        kind = (layer in adapted, layer > min(adapted), layer < min(adapted))
        if kind not in plans:
            graph = layer_graph(
                shape, targets if kind[0] else {}, bits=bits, flash=flash, style=style
            )
            plans[kind] = graph, plan_layer(graph, mode, input_gradient=kind[1], idle=kind[2])
        graph, plan = plans[kind]
        for state, found in entries.items():
            for name, why in getattr(plan, state).items():
                found.setdefault(graph.values[name], []).append(layer)
                reasons[state, graph.values[name]] = why

    head = head_graph(shape, bits=bits, style=style)
    # The head runs before the layers' backward pass and in windows of its own: only what it keeps.
    head_plan = plan_layer(head, "pruned" if mode == "layer_input" else mode, input_gradient=True)
    made = {
        state: tuple(
            Entry(value, tuple(where), reasons[state, value]) for value, where in found.items()
        )
        for state, found in entries.items()
    }
    return MemoryPlan(
        mode, tokens, window, **made, head=tuple(head.values[name] for name in head_plan.kept)
    )


def plan_layer(
    graph: LayerGraph, mode: Mode, *, input_gradient: bool, idle: bool = False
) -> LayerPlan:
    """Decide about every value of one layer.

    ``input_gradient`` says whether a lower layer waits for a gradient. An ``idle`` layer lies
    below all adapted ones.
    """
    readers = reads(graph, input_gradient)
    if mode == "conventional":
        kept = dict.fromkeys(graph.values, "the forward pass makes it")
    elif mode == "layer_input":
        kept = {} if idle else dict.fromkeys((graph.input, *graph.attention[1:]), _UNIT)
    else:
        again = redundant(graph, readers) if mode == "pruned+remat" else frozenset()
        kept = {n: f"read by the gradient of {_list(r)}" for n, r in readers.items()}
        kept = {name: why for name, why in kept.items() if name not in again}
    rematerialised = {
        name: "the layer's forward pass" if mode == "layer_input" else _recipe(graph, name, kept)
        for name in readers
        if name not in kept
    }
    dropped = {
        name: "no needed gradient reads it"
        for name in graph.values
        if name not in kept and name not in rematerialised
    }
    return LayerPlan(kept, rematerialised, dropped)


def needed_gradients(graph: LayerGraph, input_gradient: bool) -> frozenset[str]:
    """Values and parameters on a path from something trained to the layer's output."""
    trained = set(graph.parameters) | ({graph.input} if input_gradient else set())
    for op in graph.ops:
        if trained.intersection(gradient.of for gradient in op.gradients):
            trained.update(op.outputs)
    useful = {graph.output}
    for op in reversed(graph.ops):
        if useful.intersection(op.outputs):
            useful.update(gradient.of for gradient in op.gradients)
    return frozenset(trained & useful)


def reads(graph: LayerGraph, input_gradient: bool) -> dict[str, tuple[str, ...]]:
    """Values that needed gradients read, in forward order, with the gradients that do."""
    needed = needed_gradients(graph, input_gradient)
    wanted = [g for op in graph.ops for g in op.gradients if g.of in needed]
    readers: dict[str, list[str]] = {}
    for gradient in sorted(wanted, key=lambda g: g.instead is not None):  # choices come last
        served = gradient.instead is not None and all(name in readers for name in gradient.instead)
        for name in gradient.instead or () if served else gradient.reads:
            readers.setdefault(name, []).append(gradient.of)
    return {name: tuple(dict.fromkeys(readers[name])) for name in graph.values if name in readers}


def computable(graph: LayerGraph, kept: Collection[str]) -> frozenset[str]:
    """Everything that cheap ops give back from ``kept``."""
    found = set(kept)
    while True:
        more = {r.value for r in graph.recipes if found.issuperset(r.sources)} - found
        if not more:
            return frozenset(found)
        found |= more


def redundant(graph: LayerGraph, wanted: Collection[str]) -> frozenset[str]:
    """Members of ``wanted`` that the other members give back."""
    return frozenset(
        name for name in wanted if name in computable(graph, [w for w in wanted if w != name])
    )


_STATES = ("kept", "rematerialised", "dropped")
_UNIT = "a backward unit computes the layer again from it"


def _recipe(graph: LayerGraph, name: str, kept: Mapping[str, str]) -> str:
    """Which op makes ``name`` again, and from what; that may have to be made again first."""
    have = computable(graph, kept)
    recipe = next(r for r in graph.recipes if r.value == name and have.issuperset(r.sources))
    return f"{recipe.op} of {_list(recipe.sources) or 'the positions'}"


def _check(
    shape: LayerShape,
    targets: Mapping[str, Bypass],
    mode: Mode,
    tokens: int,
    window: int,
    adapted: frozenset[int],
) -> None:
    if mode not in get_args(Mode):
        raise ConfigurationError(f"mode is one of {', '.join(get_args(Mode))}, not {mode!r}")
    if tokens < 1 or window < 1:
        raise ConfigurationError(f"tokens and window must be at least 1, not {tokens} and {window}")
    if not targets or not adapted:
        raise ConfigurationError(
            "nothing is trained: name at least one adapted module and one layer"
        )
    outside = sorted(layer for layer in adapted if not 0 <= layer < shape.layers)
    if outside:
        raise ConfigurationError(
            f"the model has layers 0 to {shape.layers - 1}; there is no layer {outside[0]}"
        )


def _list(names: Sequence[str]) -> str:
    return ", ".join(names)


def _ranges(layers: Sequence[int]) -> str:
    """``0, 2-5`` for (0, 2, 3, 4, 5)."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and parts[-1][-1] == layer - 1:
            parts[-1][1:] = [layer]
        else:
            parts.append([layer])
    return ", ".join("-".join(map(str, part)) for part in parts)
