"""Runs a :class:`LayerGraph` with plain tensors; its backward pass sees only what a plan keeps.

One function per op for the forward pass, one for the gradient. The gradients are written out by
hand: autograd would read what it likes. Values are [tokens, features], weights [out, in].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anabranch.serving.coserving.layer_graph import LayerGraph, Op
from anabranch.serving.coserving.layer_shape import LayerShape
from anabranch.serving.coserving.pruning import LayerPlan, computable, needed_gradients

EPSILON = 1e-6
DROPPED = 0.3
Tensors = Mapping[str, Tensor]


class LayerExecutor:
    """``weights`` holds all parameters, frozen and trained, under the names of the graph."""

    def __init__(self, graph: LayerGraph, shape: LayerShape, weights: Tensors, tokens: int) -> None:
        self.graph, self.shape, self.weights, self.tokens = graph, shape, weights, tokens
        self.op_of = {op.name: op for op in graph.ops}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Every value of the layer."""
        values = {self.graph.input: x}
        for op in self.graph.ops:
            values |= self.run(op, values)
        return values

    def run(self, op: Op, values: Mapping[str, Any]) -> dict[str, Tensor]:
        made = getattr(self, "_" + op.kind)(op, *(values[name] for name in op.inputs))
        return dict(zip(op.outputs, made if isinstance(made, tuple) else (made,), strict=True))

    def rematerialise(self, kept: Tensors) -> dict[str, Tensor]:
        """All that the graph's recipes give back from ``kept``."""
        values = dict(kept)
        while set(values) != computable(self.graph, kept):
            for recipe in self.graph.recipes:
                op = self.op_of[recipe.op]
                if recipe.value not in values and values.keys() >= set(recipe.sources):
                    inputs = {name: values.get(name) for name in op.inputs}
                    values[recipe.value] = self.run(op, inputs)[recipe.value]
        return values

    def backward(self, kept: Tensors, dy: Tensor, input_gradient: bool) -> dict[str, Tensor]:
        """Gradients of the trained parameters (and the input) from the kept tensors alone."""
        values = self.rematerialise(kept)
        needed = needed_gradients(self.graph, input_gradient)
        gradients = {self.graph.output: dy}
        for op in reversed(self.graph.ops):
            for gradient in op.gradients:
                if gradient.of in needed:
                    reads = gradient.reads
                    if gradient.instead is not None and not values.keys() >= set(reads):
                        reads = gradient.instead
                    seen = {name: values[name] for name in reads}
                    share = getattr(self, f"_d_{op.kind}")(op, gradient.of, gradients, seen)
                    gradients[gradient.of] = gradients.get(gradient.of, 0) + share
        return {name: gradients[name] for name in needed if name in self._leaves()}

    def _leaves(self) -> set[str]:
        return {self.graph.input, *self.graph.parameters}

    # Forward

    def _linear(self, op: Op, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{op.name}.weight"], self.weights.get(f"{op.name}.bias"))

    def _add(self, op: Op, left: Tensor, right: Tensor) -> Tensor:
        return left + right

    def _scale(self, op: Op, x: Tensor) -> Tensor:
        return x * self.weights[op.weight]

    def _dropout(self, op: Op, x: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """The mask depends on the module's name alone and can be drawn again without the input."""
        generator = torch.Generator().manual_seed(sum(map(ord, op.name)))
        width = self.graph.values[op.outputs[1]].per_token
        mask = torch.rand(self.tokens, width, generator=generator) > DROPPED
        return None if x is None else x * mask / (1 - DROPPED), mask

    def _multiply(self, op: Op, left: Tensor, right: Tensor) -> Tensor:
        return left * right

    def _silu(self, op: Op, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)

    def _gelu(self, op: Op, x: Tensor) -> Tensor:
        return F.gelu(x)

    def _tanh(self, op: Op, x: Tensor) -> Tensor:
        return torch.tanh(x)

    def _relu(self, op: Op, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.relu(x), x > 0

    def _rms_norm(self, op: Op, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self._groups(op, x)
        stats = (x.pow(2).mean(-1, keepdim=True) + EPSILON).rsqrt()  # [T, groups, 1]
        out = x * stats * self.weights[f"{op.name}.weight"]
        return out.flatten(1), stats

    def _layer_norm(self, op: Op, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = x.mean(-1, keepdim=True)
        stats = torch.cat([mean, (x.var(-1, keepdim=True, correction=0) + EPSILON).rsqrt()], -1)
        out = (x - stats[:, :1]) * stats[:, 1:] * self.weights[f"{op.name}.weight"]
        return out, stats

    def _rope_tables(self, op: Op) -> tuple[Tensor, Tensor]:
        width = self.shape.head_dim
        frequencies = 10000.0 ** (-torch.arange(0, width, 2) / width)
        angles = torch.arange(self.tokens)[:, None] * frequencies.repeat(2)
        dtype = next(iter(self.weights.values())).dtype
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def _rope(self, op: Op, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x.unflatten(1, (-1, self.shape.head_dim))
        left, right = x.chunk(2, -1)
        turned = torch.cat([-right, left], -1)
        return (x * cos[:, None] + turned * sin[:, None]).flatten(1)

    def _flash_attention(self, op: Op, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        scores = self._scaled_scores(q, k)
        lse = scores.logsumexp(-1)  # [heads, T]
        return self._merge((scores - lse[..., None]).exp() @ self._repeat(v)), lse

    def _scores(self, op: Op, q: Tensor, k: Tensor) -> Tensor:
        return self._scaled_scores(q, k)

    def _softmax(self, op: Op, scores: Tensor) -> Tensor:
        return scores.softmax(-1)

    def _weighted_sum(self, op: Op, chances: Tensor, v: Tensor) -> Tensor:
        return self._merge(chances @ self._repeat(v))

    # Gradients: (op, which, gradients so far, the values that this one reads)

    def _d_linear(self, op: Op, of: str, g: Tensors, read: Tensors) -> Tensor:
        dy = g[op.outputs[0]]
        if of.endswith(".bias"):
            return dy.sum(0)
        if of.endswith(".weight"):
            return dy.T @ read[op.inputs[0]]
        return dy @ self.weights[f"{op.name}.weight"]

    def _d_add(self, op: Op, of: str, g: Tensors, read: Tensors) -> Tensor:
        return g[op.outputs[0]]

    def _d_scale(self, op: Op, of: str, g: Tensors, read: Tensors) -> Tensor:
        dy = g[op.outputs[0]]
        return (dy * read[op.inputs[0]]).sum(0) if of == op.weight else dy * self.weights[op.weight]

    def _d_dropout(self, op: Op, of: str, g: Tensors, read: Tensors) -> Tensor:
        return g[op.outputs[0]] * read[op.outputs[1]] / (1 - DROPPED)

    def _d_multiply(self, op: Op, of: str, g: Tensors, read: Tensors) -> Tensor:
        (other,) = read.values()
        return g[op.outputs[0]] * other

    def _d_silu(self, op: Op, of: str, g: Tensors, read: Tensors) -> Tensor:
        x = read[op.inputs[0]]
        gate = torch.sigmoid(x)
        return g[op.outputs[0]] * gate * (1 + x * (1 - gate))

    def _d_gelu(self, op: Op, of: str, g: Tensors, read: Tensors) -> Tensor:
        x = read[op.inputs[0]]
        density = (-x.square() / 2).exp() / (2 * torch.pi) ** 0.5
        return g[op.outputs[0]] * (0.5 * (1 + torch.erf(x / 2**0.5)) + x * density)

    def _d_tanh(self, op: Op, of: str, g: Tensors, read: Tensors) -> Tensor:
        return g[op.outputs[0]] * (1 - read[op.outputs[0]].square())

    def _d_relu(self, op: Op, of: str, g: Tensors, read: Tensors) -> Tensor:
        (mask_or_output,) = read.values()
        return g[op.outputs[0]] * (mask_or_output > 0)

    def _d_rms_norm(self, op: Op, of: str, g: Tensors, read: Tensors) -> Tensor:
        source, stats = (read[name] for name in (op.inputs[0], op.outputs[1]))
        unit = self._groups(op, source) * stats
        dy = self._groups(op, g[op.outputs[0]]) * self.weights[f"{op.name}.weight"]
        return (stats * (dy - unit * (dy * unit).mean(-1, keepdim=True))).flatten(1)

    def _d_layer_norm(self, op: Op, of: str, g: Tensors, read: Tensors) -> Tensor:
        source, stats = (read[name] for name in (op.inputs[0], op.outputs[1]))
        unit = (source - stats[:, :1]) * stats[:, 1:]
        dy = g[op.outputs[0]] * self.weights[f"{op.name}.weight"]
        centred = dy - dy.mean(-1, keepdim=True) - unit * (dy * unit).mean(-1, keepdim=True)
        return stats[:, 1:] * centred

    def _d_rope(self, op: Op, of: str, g: Tensors, read: Tensors) -> Tensor:
        cos, sin = (read[name][:, None] for name in op.inputs[1:])
        dy = g[op.outputs[0]].unflatten(1, (-1, self.shape.head_dim))
        left, right = (dy * sin).chunk(2, -1)
        return (dy * cos + torch.cat([right, -left], -1)).flatten(1)

    def _d_flash_attention(self, op: Op, of: str, g: Tensors, read: Tensors) -> Tensor:
        query, key, value = op.inputs
        chances = (
            self._scaled_scores(read[query], read[key]) - read[op.outputs[1]][..., None]
        ).exp()
        dy = self._heads(g[op.outputs[0]])
        if of == value:
            return self._sum_groups(chances.mT @ dy)
        total = (dy * self._heads(read[op.outputs[0]])).sum(-1, keepdim=True)
        ds = chances * (dy @ self._repeat(read[value]).mT - total) * self.shape.head_dim**-0.5
        if of == query:
            return self._merge(ds @ self._repeat(read[key]))
        return self._sum_groups(ds.mT @ self._heads(read[query]))

    def _d_scores(self, op: Op, of: str, g: Tensors, read: Tensors) -> Tensor:
        (other,) = read.values()
        ds = g[op.outputs[0]] * self.shape.head_dim**-0.5
        if of == op.inputs[0]:
            return self._merge(ds @ self._repeat(other))
        return self._sum_groups(ds.mT @ self._heads(other))

    def _d_softmax(self, op: Op, of: str, g: Tensors, read: Tensors) -> Tensor:
        chances, dy = read[op.outputs[0]], g[op.outputs[0]]
        return chances * (dy - (dy * chances).sum(-1, keepdim=True))

    def _d_weighted_sum(self, op: Op, of: str, g: Tensors, read: Tensors) -> Tensor:
        (other,) = read.values()
        dy = self._heads(g[op.outputs[0]])
        if of == op.inputs[0]:
            return dy @ self._repeat(other).mT
        return self._sum_groups(other.mT @ dy)

    # Shapes

    def _groups(self, op: Op, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.graph.values[op.outputs[1]].per_token, -1))

    def _heads(self, x: Tensor) -> Tensor:
        """[T, heads * D] -> [heads, T, D]"""
        return x.unflatten(1, (-1, self.shape.head_dim)).transpose(0, 1)

    def _repeat(self, x: Tensor) -> Tensor:
        """[T, kv_heads * D] -> [heads, T, D]"""
        return self._heads(x).repeat_interleave(self.shape.heads // self.shape.kv_heads, 0)

    def _merge(self, x: Tensor) -> Tensor:
        """[heads, T, D] -> [T, heads * D]"""
        return x.transpose(0, 1).flatten(1)

    def _sum_groups(self, x: Tensor) -> Tensor:
        """[heads, T, D] -> [T, kv_heads * D], each the sum of the heads that share it"""
        return self._merge(x.unflatten(0, (self.shape.kv_heads, -1)).sum(1))

    def _scaled_scores(self, q: Tensor, k: Tensor) -> Tensor:
        """[heads, T, T], minus infinity where a query would look ahead"""
        scores = self._heads(q) @ self._repeat(k).mT * self.shape.head_dim**-0.5
        ahead = torch.ones(self.tokens, self.tokens, dtype=torch.bool).triu(1)
        return scores.masked_fill(ahead, -torch.inf)


class PlannedLayer(torch.autograd.Function):
    """The layer as one autograd node that saves exactly the plan's kept tensors."""

    @staticmethod
    def forward(
        ctx: Any,
        executor: LayerExecutor,
        plan: LayerPlan,
        input_gradient: bool,
        names: tuple[str, ...],
        x: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        values = executor.forward(x)
        ctx.executor, ctx.input_gradient, ctx.names = executor, input_gradient, names
        ctx.kept = tuple(plan.kept)
        ctx.save_for_backward(*(values[name] for name in ctx.kept))
        return values[executor.graph.output].clone()

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        kept = dict(zip(ctx.kept, ctx.saved_tensors, strict=True))
        gradients = ctx.executor.backward(kept, outputs[0], ctx.input_gradient)
        parameters = (gradients[name] for name in ctx.names)
        return (None, None, None, None, gradients.get(ctx.executor.graph.input), *parameters)


def random_weights(graph: LayerGraph, seed: int) -> dict[str, Tensor]:
    """All parameters of a graph in float64; none is zero, lest a gradient vanish by chance."""

    def noise(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64)

    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for op in graph.ops:
        if op.weight is None:
            continue
        width = graph.values[op.inputs[0]].per_token
        if op.kind == "linear":
            weights[op.weight] = 0.3 * noise(graph.values[op.outputs[0]].per_token, width)
        else:
            groups = graph.values[op.outputs[1]].per_token if op.kind == "rms_norm" else 1
            weights[op.weight] = 1 + 0.2 * noise(width // groups)
    for name in graph.parameters:
        if name.endswith(".bias"):
            weights[name] = noise(graph.values[name.removesuffix(".bias")].per_token)
    return {name: w.requires_grad_(name in graph.parameters) for name, w in weights.items()}
