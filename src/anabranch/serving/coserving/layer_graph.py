"""The op graph of one decoder layer: who makes which tensor, and what each gradient reads.

The graph says about every op what a derivative table says: to compute the gradient of this input
(or weight) from the gradients of the outputs, these forward tensors must be at hand. Frozen
weights have no gradient, so a frozen linear map reads nothing. :mod:`.pruning` decides from it
what a training step must keep.

The graph does not know tensors' contents, positions or batches: sizes are per token, with one term
for what grows with pairs of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from anabranch.errors import UnknownName
from anabranch.serving.coserving.layer_shape import (
    IA3,
    Activation,
    Bottleneck,
    Bypass,
    LayerShape,
    Lora,
    TrainedBias,
)

Style = Literal["planned", "pytorch"]
"""``planned``: each gradient reads the least that mathematics allows. ``pytorch``: what the
derivative formulas of PyTorch (on the CPU) save when they run the Hugging Face model."""


@dataclass(frozen=True)
class Value:
    """A tensor of the forward pass: ``fixed + per_token T + per_pair T^2`` elements."""

    name: str
    per_token: int
    bits: int
    """Of one element; a mask has 1."""
    per_pair: int = 0
    fixed: int = 0
    shared: bool = False
    """One for the whole model instead of one in each layer."""

    def bytes(self, tokens: int, context: int | None = None) -> int:
        """Size for ``tokens`` of a sequence that look at ``context`` (default: themselves)."""
        pairs = tokens * (tokens if context is None else context)
        elements = self.fixed + self.per_token * tokens + self.per_pair * pairs
        return -(-elements * self.bits // 8)

    @property
    def shape(self) -> str:
        """For people: ``[T, 4096]``."""
        if self.per_pair:
            return f"[{self.per_pair}, T, T]"
        return f"[T, {self.per_token}]" if self.per_token else f"[{self.fixed}]"


@dataclass(frozen=True)
class Gradient:
    """The gradient of ``of`` (a value or a trained parameter) reads these values.

    ``instead`` names another set that serves as well, used if it is kept anyway.
    """

    of: str
    reads: tuple[str, ...] = ()
    instead: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Op:
    """One forward op. ``kind`` tells an executor what to compute with ``weight``."""

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    gradients: tuple[Gradient, ...]
    weight: str | None = None


@dataclass(frozen=True)
class Recipe:
    """``value`` is one cheap op away from ``sources``: elementwise, a rotation, or a row sum."""

    value: str
    sources: tuple[str, ...]
    op: str
    """Name of the op that makes it."""


@dataclass(frozen=True)
class LayerGraph:
    """Ops in forward order. ``parameters`` are the trained ones."""

    values: Mapping[str, Value]
    ops: tuple[Op, ...]
    recipes: tuple[Recipe, ...]
    parameters: frozenset[str]
    input: str
    output: str
    attention: tuple[str, ...]
    """Names of query, key and value as the attention reads them; empty for the head."""


def layer_graph(
    shape: LayerShape,
    targets: Mapping[str, Bypass],
    *,
    bits: int = 16,
    flash: bool = True,
    style: Style = "planned",
) -> LayerGraph:
    """The graph of one layer with bypass networks at ``targets``.

    ``bits`` is the size of an activation. ``flash`` False spells the attention probabilities out.
    Raises :class:`~anabranch.errors.UnknownName` for a module that the layer does not have.
    """
    for name in targets:
        if name not in shape.modules:
            raise UnknownName("linear module", name, shape.modules)
    return _Builder(shape, targets, bits, flash, style).layer()


def head_graph(shape: LayerShape, *, bits: int = 16, style: Style = "planned") -> LayerGraph:
    """Final norm, output projection and cross-entropy, all frozen; the input is ``x``."""
    return _Builder(shape, {}, bits, True, style).head()


class _Builder:
    """Appends ops in forward order. Each method returns the name of what it made."""

    def __init__(
        self, shape: LayerShape, targets: Mapping[str, Bypass], bits: int, flash: bool, style: Style
    ) -> None:
        self.shape, self.targets, self.bits, self.flash = shape, targets, bits, flash
        self.pytorch = style == "pytorch"
        self.values: dict[str, Value] = {}
        self.ops: list[Op] = []
        self.recipes: list[Recipe] = []
        self.parameters: set[str] = set()

    def layer(self) -> LayerGraph:
        s = self.shape
        x = self.value("x", s.hidden)
        normed = self.norm("input_layernorm", x)
        query, key, value = (self.module(n, normed) for n in ("q_proj", "k_proj", "v_proj"))
        if s.qk_norm:
            query = self.norm("q_norm", query, s.heads)
            key = self.norm("k_norm", key, s.kv_heads)
        if s.rope:
            tables = self.rope_tables()
            query, key = self.rope("query", query, tables), self.rope("key", key, tables)
        mixed = (self.flash_attention if self.flash else self.attention)(query, key, value)
        middle = self.add("middle", x, self.module("o_proj", mixed))
        normed = self.norm("post_attention_layernorm", middle)
        output = self.add("output", middle, self.module("down_proj", self.mlp(normed)))
        return self.graph(x, output, (query, key, value))

    def head(self) -> LayerGraph:
        x = self.value("x", self.shape.hidden)
        normed = self.norm("norm", x)
        logits = self.linear("lm_head", normed, self.shape.vocabulary)
        # Hugging Face computes the loss in float32 and pads the labels by one.
        labels = self.value("labels", 1, bits=64, fixed=1)
        count = self.value("label_count", 0, bits=32, fixed=1)
        chances = self.value("log_probabilities", self.shape.vocabulary, bits=32)
        loss = self.value("loss", 0, bits=32, fixed=1)
        reads = (chances, labels, count)
        self.op("cross_entropy", "loss", (logits,), (*reads, loss), (Gradient(logits, reads),))
        return self.graph(x, loss, ())

    def graph(self, x: str, output: str, attention: tuple[str, ...]) -> LayerGraph:
        return LayerGraph(
            values=self.values,
            ops=tuple(self.ops),
            recipes=tuple(self.recipes),
            parameters=frozenset(self.parameters),
            input=x,
            output=output,
            attention=attention,
        )

    # Modules

    def module(self, name: str, x: str) -> str:
        """A linear module with its bypass, if it has one."""
        width = self.shape.modules[name][1]
        bypass = self.targets.get(name)
        if isinstance(bypass, IA3) and bypass.on == "input":
            return self.linear(name, self.scale(f"{name}.scaled", x, f"{name}.ia3"), width)
        y = self.linear(name, x, width, trained_bias=isinstance(bypass, TrainedBias))
        if isinstance(bypass, IA3):
            return self.scale(f"{name}.scaled", y, f"{name}.ia3")
        if isinstance(bypass, Lora):
            source = self.dropout(f"{name}.dropout", x) if bypass.dropout else x
            down = self.linear(f"{name}.lora_A", source, bypass.rank, trained=True)
            up = self.linear(f"{name}.lora_B", down, width, trained=True)
            return self.add(f"{name}.sum", y, up)
        if isinstance(bypass, Bottleneck):
            source = y if bypass.place == "series_output" else x
            down = self.linear(f"{name}.down", source, bypass.size, trained=True)
            act = self.activation(bypass.activation, f"{name}.act", down)
            up = self.linear(f"{name}.up", act, width, trained=True)
            return self.add(f"{name}.sum", y, up)
        return y

    def mlp(self, x: str) -> str:
        if not self.shape.gated:
            return self.activation(self.shape.mlp, "act", self.module("up_proj", x))
        gate, up = self.module("gate_proj", x), self.module("up_proj", x)
        act = self.activation(self.shape.mlp, "act", gate)
        out = self.value("product", self.shape.intermediate)
        gradients = (Gradient(act, (up,)), Gradient(up, (act,)))
        self.op("multiply", out, (act, up), (out,), gradients, cheap=True)
        return out

    # Ops

    def linear(
        self, name: str, x: str, width: int, trained: bool = False, trained_bias: bool = False
    ) -> str:
        out = self.value(name, width)
        gradients = [Gradient(x)]
        if trained:
            self.parameters.add(f"{name}.weight")
            gradients.append(Gradient(f"{name}.weight", (x,)))
        if trained_bias:
            self.parameters.add(f"{name}.bias")
            gradients.append(Gradient(f"{name}.bias"))
        self.op("linear", name, (x,), (out,), tuple(gradients), weight=f"{name}.weight")
        return out

    def add(self, name: str, left: str, right: str) -> str:
        out = self.value(name, self.values[left].per_token)
        gradients = (Gradient(left), Gradient(right))
        self.op("add", name, (left, right), (out,), gradients, cheap=True)
        return out

    def scale(self, name: str, x: str, vector: str) -> str:
        width = self.values[x].per_token
        out = self.value(name, width)
        self.parameters.add(vector)
        # PEFT multiplies the vectors of all active adapters first, which copies a single one.
        copy = (self.value(f"{name}.vector", 0, fixed=width),) if self.pytorch else ()
        gradients = (Gradient(x, copy), Gradient(vector, (x,)))
        self.op("scale", name, (x,), (out, *copy), gradients, weight=vector)
        self.recipes.append(Recipe(out, (x,), name))
        return out

    def dropout(self, name: str, x: str) -> str:
        width = self.values[x].per_token
        # PyTorch's CPU kernel keeps the scaled mask in the type of the activations.
        mask = self.value(f"{name}.mask", width, bits=self.bits if self.pytorch else 1)
        out = self.value(name, width)
        self.op("dropout", name, (x,), (out, mask), (Gradient(x, (mask,)),))
        # A counter-based generator draws the same mask again.
        self.recipes += [Recipe(mask, (), name), Recipe(out, (x, mask), name)]
        return out

    def activation(self, kind: Activation, name: str, x: str) -> str:
        width = self.values[x].per_token
        if kind == "identity":
            return x
        out = self.value(name, width)
        gradient = Gradient(x, (x,))
        outputs: tuple[str, ...] = (out,)
        if kind == "tanh" or (kind == "relu" and self.pytorch):
            gradient = Gradient(x, (out,))
        elif kind == "relu":
            mask = self.value(f"{name}.mask", width, bits=1)
            gradient, outputs = Gradient(x, (mask,), instead=(out,)), (out, mask)
        self.op(kind, name, (x,), outputs, (gradient,), cheap=True)
        return out

    def norm(self, name: str, x: str, groups: int = 1) -> str:
        """RMSNorm or LayerNorm over each of ``groups`` parts of the features."""
        width = self.values[x].per_token
        rms = self.shape.norm == "rms"
        source = x
        if rms and self.pytorch and self.bits < 32:
            source = self.value(f"{name}.float32", width, bits=32)
            self.op("cast", source, (x,), (source,), (Gradient(x),), cheap=True)
        stats = self.value(f"{name}.stats", groups if rms else 2 * groups, bits=32)
        out = self.value(name, width)
        kind = "rms_norm" if rms else "layer_norm"
        gradient = Gradient(source, (source, stats))
        self.op(kind, name, (source,), (out, stats), (gradient,), weight=f"{name}.weight")
        self.recipes += [Recipe(stats, (source,), name), Recipe(out, (source, stats), name)]
        return out

    def rope_tables(self) -> tuple[str, str]:
        width = self.shape.head_dim
        cos, sin = (self.value(n, width, shared=True) for n in ("cos", "sin"))
        self.op("rope_tables", "rope_tables", (), (cos, sin), (), cheap=True)
        return cos, sin

    def rope(self, name: str, x: str, tables: tuple[str, str]) -> str:
        out = self.value(name, self.values[x].per_token)
        self.op("rope", name, (x, *tables), (out,), (Gradient(x, tables),), cheap=True)
        return out

    def flash_attention(self, query: str, key: str, value: str) -> str:
        out = self.value("mixed", self.shape.heads * self.shape.head_dim)
        lse = self.value("log_sum_exp", self.shape.heads, bits=32)
        # P = exp(q k^T - lse). dV = P^T dO needs no more than P. The softmax backward of dQ and dK
        # needs rowsum(dP * P), which equals rowsum(dO * O).
        probabilities, both = (query, key, lse), (query, key, value, out, lse)
        for_value = both if self.pytorch else probabilities
        gradients = (Gradient(query, both), Gradient(key, both), Gradient(value, for_value))
        self.op("flash_attention", "attention", (query, key, value), (out, lse), gradients)
        return out

    def attention(self, query: str, key: str, value: str) -> str:
        heads, width = self.shape.heads, self.shape.heads * self.shape.head_dim
        if self.pytorch and self.shape.kv_heads < heads:
            key, value = self.repeat(f"{key}.repeated", key), self.repeat("value.repeated", value)
        scores = self.value("scores", 0, per_pair=heads)
        chances = self.value("probabilities", 0, per_pair=heads, bits=32 if self.pytorch else None)
        gradients = (Gradient(query, (key,)), Gradient(key, (query,)))
        self.op("scores", scores, (query, key), (scores,), gradients)
        self.op("softmax", chances, (scores,), (chances,), (Gradient(scores, (chances,)),))
        if self.values[chances].bits != self.bits:
            cast = self.value("probabilities.cast", 0, per_pair=heads)
            self.op("cast", cast, (chances,), (cast,), (Gradient(chances),), cheap=True)
            chances = cast
        out = self.value("mixed", width)
        gradients = (Gradient(chances, (value,)), Gradient(value, (chances,)))
        self.op("weighted_sum", out, (chances, value), (out,), gradients)
        return out

    def repeat(self, name: str, x: str) -> str:
        out = self.value(name, self.shape.heads * self.shape.head_dim)
        self.op("repeat", name, (x,), (out,), (Gradient(x),), cheap=True)
        return out

    def value(self, name: str, per_token: int, bits: int | None = None, **more: Any) -> str:
        self.values[name] = Value(name, per_token, bits or self.bits, **more)
        return name

    def op(
        self,
        kind: str,
        name: str,
        inputs: tuple[str, ...],
        outputs: tuple[str, ...],
        gradients: tuple[Gradient, ...],
        weight: str | None = None,
        cheap: bool = False,
    ) -> None:
        """``cheap``: every output can be had again from the inputs."""
        self.ops.append(Op(kind, name, inputs, outputs, gradients, weight))
        if cheap:
            self.recipes += [Recipe(output, inputs, name) for output in outputs]
