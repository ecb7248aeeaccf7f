"""The backward pass of a pack, cut into units that fit into any amount of time.

FlexLLM's token-level fine-tuning (Oliaro et al., section 6): the layers are taken from the last to
the first, and each layer's rows in windows from the last to the first. A window's queries read the
keys and values of all rows before it, so its backward pass adds to their gradients; when a window's
turn comes, all later windows have added their share, and the gradient of its own keys and values is
complete. Hence the result does not depend on how the rows are cut::

    x       = X_l[a:b]                                    saved by the forward pass
    y, k, v = layer_l(x, past = K_l[:a], V_l[:a])         computed again
    dx, dk_past, dv_past, dθ = gradients of (y, k, v)
                               along (dX_{l+1}[a:b], dK[a:b], dV[a:b])
    dX_l[a:b] = dx;  dK[:a] += dk_past;  dV[:a] += dv_past;  dθ_l += dθ

Units of one layer run in this order; units of different packs are independent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.errors import AdapterError
from anabranch.serving.coserving.pack import Pack, Span
from anabranch.serving.coserving.trainee import Trainee
from anabranch.serving.runner.paged_attention import AttentionCall, AttentionPlan, attention
from anabranch.training.head import token_nll

TOLERANCE = 0.05
"""Relative difference: eight bits round a value that is off by the last bit to another number."""

ReadCache = Callable[[int, list[int], int], tuple[Tensor, Tensor]]
"""Layer, pages, tokens -> keys and values ``[kv_heads, tokens, head_dim]``."""


@dataclass
class WindowPlan(AttentionPlan):
    """Attention of one window, with gradients for its keys and values and for those before it."""

    spans: list[Span]
    past: tuple[Tensor, Tensor] | None
    """Keys and values ``[kv_heads, p, head_dim]`` of the first span's sequence before it."""
    dtype: torch.dtype
    """To which the cache rounded keys and values when the window was served."""
    keys: Tensor = field(init=False)
    """``[1, kv_heads, n, head_dim]`` of the window, with a gradient."""
    values: Tensor = field(init=False)

    def attend(self, call: AttentionCall) -> Tensor:
        """Sequence by sequence."""
        query = call.query
        self.keys, self.values = call.key, call.value
        repeats = query.shape[1] // call.key.shape[1]
        key, value = _rounded(call.key, self.dtype), _rounded(call.value, self.dtype)
        first = self.spans[0].start
        outputs = []
        for number, span in enumerate(self.spans):
            rows = slice(span.start - first, span.stop - first)
            keys, values = key[0, :, rows], value[0, :, rows]
            if number == 0 and self.past is not None:
                keys = torch.cat([self.past[0], keys], dim=1)
                values = torch.cat([self.past[1], values], dim=1)
            keys = keys.repeat_interleave(repeats, dim=0)[None]
            values = values.repeat_interleave(repeats, dim=0)[None]
            queries = query[:, :, rows]
            whole = queries.shape[2] == keys.shape[2]
            if whole and call.softcap is None and call.window is None:
                attended = F.scaled_dot_product_attention(
                    queries, keys, values, is_causal=True, scale=call.scaling
                )
            else:
                mask = _mask(queries.shape[2], keys.shape[2], call.window, query)
                attended = attention(queries, keys, values, mask, call)
            outputs.append(attended[0].transpose(0, 1))  # [n, heads, head_dim]
        return torch.cat(outputs)[None]


class Backward:
    """Head windows, then (layer, window) units.

    ``scale`` multiplies the sum of the losses of the pack's trained tokens: one over the number of
    trained tokens of the optimiser step. Call :meth:`head` until ``head_left`` is 0, then
    :meth:`unit` until ``done``, with any sizes, and :meth:`add_gradients` once.

    With ``prove`` every layer's output is compared with what was served.
    """

    def __init__(
        self,
        pack: Pack,
        trainee: Trainee,
        read_cache: ReadCache,
        cache_dtype: torch.dtype,
        scale: float,
        prove: bool = False,
    ) -> None:
        self.pack = pack
        self.nll = 0.0
        """Sum over the trained tokens whose head window ran."""
        self.layer = len(trainee.trunk.layers) - 1
        self.stop = pack.rows
        """The next unit of :attr:`layer` ends before this row."""
        self._trainee = trainee
        self._read_cache = read_cache
        self._dtype = cache_dtype
        self._scale = scale
        self._prove = prove
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._headed = 0
        self._above = torch.zeros_like(pack.inputs[self.layer + 1])
        self._below = torch.empty_like(self._above)
        self._kv: tuple[Tensor, Tensor] | None = None

    @property
    def head_left(self) -> int:
        """Trained tokens whose loss is still to be computed."""
        return len(self.pack.predictors) - self._headed

    @property
    def done(self) -> bool:
        """Whether the gradients are complete."""
        return not self.head_left and self.layer < self._trainee.lowest

    @property
    def bytes(self) -> int:
        """Memory of the gradients that are handed on."""
        kv = self._kv or ()
        return self._above.nbytes + self._below.nbytes + sum(t.nbytes for t in kv)

    def head(self, tokens: int, gradients: bool = True) -> None:
        """Losses of the next trained tokens, and their gradients at the last layer's output."""
        window = slice(self._headed, self._headed + tokens)
        rows, targets = self.pack.predictors[window], self.pack.targets[window]
        hidden = self.pack.inputs[self.layer + 1][rows].requires_grad_(gradients)
        trunk = self._trainee.trunk
        with torch.set_grad_enabled(gradients):
            losses = token_nll(trunk.head, trunk.norm(hidden), targets)
        if gradients:
            (gradient,) = torch.autograd.grad(losses.sum() * self._scale, hidden)
            self._above[rows] = gradient
        self.nll += float(losses.detach().sum())
        self._headed += len(rows)

    def unit(self, rows: int) -> None:
        """Backward through the present layer for the last ``rows`` rows that are left in it."""
        pack, trainee, layer = self.pack, self._trainee, self.layer
        start, stop = max(0, self.stop - rows), self.stop
        window = slice(start, stop)
        plan, past = self._plan(start, stop)
        # Nothing waits for the gradient of the lowest layer's input.
        x = pack.inputs[layer][window].requires_grad_(layer > trainee.lowest)
        parameters = trainee.parameters[layer]
        with torch.enable_grad(), trainee.replaying(pack, layer, start, stop):
            y = trainee.trunk.layer(layer, x, pack.positions[window], plan)
        if self._prove:
            _require_same(x.detach(), y.detach(), pack.inputs[layer + 1][window], layer)
        if self._kv is None:
            kv_heads, _, width = plan.keys.shape[1:]
            self._kv = (
                torch.zeros(kv_heads, pack.rows, width),
                torch.zeros(kv_heads, pack.rows, plan.values.shape[3]),
            )
        keys, values = self._kv
        known = {
            y: self._above[window],
            plan.keys: keys[None, :, window],
            plan.values: values[None, :, window],
        }
        known = {output: gradient for output, gradient in known.items() if output.requires_grad}
        wanted = [tensor for tensor in (x, *past, *parameters) if tensor.requires_grad]
        gradients = dict(
            zip(
                wanted,
                torch.autograd.grad([*known], wanted, [*known.values()], allow_unused=True),
                strict=True,
            )
        )
        if x.requires_grad:
            self._below[window] = gradients[x]
        before = slice(plan.spans[0].first, start)
        for tensor, total in zip(past, self._kv, strict=False):
            if gradients[tensor] is not None:
                total[:, before] += gradients[tensor]
        for parameter in parameters:
            gradient = gradients[parameter]
            if gradient is not None:
                sofar = self._gradients.get(parameter)
                self._gradients[parameter] = gradient if sofar is None else sofar.add_(gradient)
        self.stop = start
        if not start:
            self._next_layer()

    def add_gradients(self) -> None:
        """Add the pack's gradients to ``parameter.grad``."""
        for parameter, gradient in self._gradients.items():
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        self._gradients = {}

    def _plan(self, start: int, stop: int) -> tuple[WindowPlan, tuple[Tensor, ...]]:
        spans = list(self.pack.spans(start, stop))
        head = spans[0]
        if head.start == head.first:
            return WindowPlan(spans, None, self._dtype), ()
        pages = self.pack.sequences[head.sequence].pages
        keys, values = self._read_cache(self.layer, pages, head.start - head.first)
        past = keys.float().requires_grad_(), values.float().requires_grad_()
        return WindowPlan(spans, past, self._dtype), past

    def _next_layer(self) -> None:
        self.layer -= 1
        self.stop = self.pack.rows
        self._above, self._below = self._below, self._above
        if self._kv is not None:
            for gradient in self._kv:
                gradient.zero_()


def _require_same(x: Tensor, computed: Tensor, served: Tensor, layer: int) -> None:
    """Compare what a layer adds to its input, computed again, with what it added when it served."""
    difference = float((computed - served).norm() / (served - x).norm().clamp_min(1e-30))
    if difference > TOLERANCE:  # not for NaN, which the trainer reports as such
        raise AdapterError(
            f"this model cannot be trained while it serves: layer {layer}, called on its own, "
            f"differs by {difference:.1%} from what the model computes; use `anabranch finetune`"
        )


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Values as the cache keeps them; the gradient passes as if nothing had been rounded."""
    return x if x.dtype == dtype else x + (x.detach().to(dtype).to(x.dtype) - x.detach())


def _mask(queries: int, keys: int, window: int | None, like: Tensor) -> Tensor:
    """Additive causal mask ``[queries, keys]`` for the last ``queries`` of ``keys`` positions."""
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    visible = distance >= 0
    if window is not None:
        visible &= distance < window
    return torch.zeros_like(distance, dtype=like.dtype).masked_fill_(~visible, float("-inf"))
