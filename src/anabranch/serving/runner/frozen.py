"""Linear layers around weights that the runner keeps, for modules that are trained on top of them.

An adapter is trained on the very weights that answer requests, in the number format in which they
are served: the forward product is the runner's own, and the gradient with respect to the input is
that of the served weight. Rounding of activations inside an 8-bit product counts as the identity,
as in QLoRA (Dettmers et al. 2023, section 3).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FrozenLinear(nn.Linear):
    """Looks like ``nn.Linear`` to PEFT, and owns no weight.

    ``product`` computes ``[rows, inputs] -> [rows, outputs]``, bias included; ``transposed`` takes
    a gradient ``[rows, outputs]`` back to ``[rows, inputs]``; ``dense`` gives the weight
    ``[outputs, inputs]`` to whoever must see it, such as an adapter that starts from its singular
    vectors.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        product: Callable[[Tensor], Tensor],
        transposed: Callable[[Tensor], Tensor],
        dense: Callable[[], Tensor],
        bias: Tensor | None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate a weight
        self.in_features, self.out_features = inputs, outputs
        self.product, self.transposed = product, transposed
        self._dense = dense
        self.register_buffer("bias", bias, persistent=False)
        self.replay: Tensor | None = None
        """Outputs ``[rows, outputs]`` of an earlier call on the same rows, not computed again."""

    @classmethod
    def of(cls, linear: nn.Linear) -> FrozenLinear:
        """Around the weight of a layer, which is shared."""
        weight = linear.weight.detach()
        bias = None if linear.bias is None else linear.bias.detach()
        return cls(
            linear.in_features,
            linear.out_features,
            lambda x: F.linear(x, weight, bias),
            lambda gradient: gradient @ weight,
            lambda: weight,
            bias,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenLinear:
        """Another layer around the same weight."""
        sizes = self.in_features, self.out_features
        return FrozenLinear(*sizes, self.product, self.transposed, self._dense, self.bias)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight ``[outputs, inputs]``, to be read only. If it is stored otherwise it is made
        anew at every call, except within :func:`made_once`."""
        last: _Last | None = getattr(_made, "last", None)
        if last is None:
            return self._dense()
        if last.of is not self:
            last.of, last.weight = self, self._dense()
        assert last.weight is not None
        return last.weight

    def forward(self, x: Tensor) -> Tensor:
        """``[..., inputs] -> [..., outputs]``, with a gradient for ``x`` only."""
        rows = x.reshape(-1, self.in_features)
        out: Tensor = _Product.apply(rows, self, self.replay)
        return out.view(*x.shape[:-1], self.out_features)


@dataclass
class _Last:
    """The layer whose weight was made last, and that weight."""

    of: FrozenLinear | None = None
    weight: Tensor | None = None


_made = threading.local()


@contextmanager
def made_once() -> Iterator[None]:
    """In this thread a weight that is asked for again and again, layer by layer, is made once.

    PEFT reads each layer's weight a dozen times while it attaches an adapter: for its shape, its
    device and its type.
    """
    _made.last = _Last()
    try:
        yield
    finally:
        _made.last = None


class _Product(torch.autograd.Function):
    """Keeps nothing for the backward pass: a frozen product's gradient needs only its weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: FrozenLinear, replay: Tensor | None) -> Tensor:
        ctx.linear = linear
        return linear.product(x) if replay is None else replay.view(len(x), -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.linear.transposed(gradients[0]), None, None


def frozen_linears(layer: nn.Module) -> Iterator[tuple[str, FrozenLinear]]:
    """The frozen linear layers of a decoder layer by name, also those that an adapter wraps."""
    for name, module in layer.named_modules():
        if isinstance(module, FrozenLinear):
            yield name.removesuffix(".base_layer"), module
