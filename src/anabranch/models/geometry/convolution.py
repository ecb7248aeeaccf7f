"""Convolutions whose kernels are functions of invariants, and the block around them.

Knows nothing of clouds: it gets features [nodes, orientations, channels], the edges between nodes
and kernel bases that all layers share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.models.geometry.errors import GeometryError
from anabranch.models.geometry.invariants import polynomial, smooth_cutoff
from anabranch.models.geometry.spaces import Space


@dataclass(frozen=True)
class Bases:
    """Values of the basis functions at a cloud's invariants."""

    spatial: Tensor
    """[edges, orientations, basis]; of a full kernel [edges, receiving, sending, basis]."""
    own: Tensor | None
    """[basis] or [receiving, sending, basis], of every node and itself."""
    fibre: Tensor | None
    """[receiving, sending orientations, basis], if kernels are separable."""


class KernelBasis(nn.Module):
    """Learned functions of ``count`` invariants: [..., count] -> [..., basis]."""

    def __init__(self, count: int, degree: int, basis: int) -> None:
        super().__init__()
        self.degree = degree
        features = sum(count**power for power in range(1, degree + 1))
        self.layers = nn.Sequential(
            nn.Linear(features, basis), nn.GELU(), nn.Linear(basis, basis), nn.GELU()
        )

    def forward(self, invariants: Tensor) -> Tensor:
        """Not bounded in distance; see :func:`bounded`."""
        return self.layers(polynomial(invariants, self.degree))


def bounded(spatial: Tensor, distance: Tensor, radius: float | None) -> Tensor:
    """A spatial basis [edges, ..., basis] that falls smoothly to zero at ``radius``."""
    if radius is None:
        return spatial
    return spatial * smooth_cutoff(distance, radius).view(-1, *[1] * (spatial.ndim - 1))


class SeparableConv(nn.Module):
    """Depth-wise convolution in two steps, over neighbours and then over directions.

    ``y[i,o,c] = sum_(j in N(i)) (W_s B[ij,o])_c h[j,o,c]`` and
    ``z[i,p,c] = (1/O) sum_o (W_f F[p,o])_c y[i,o,c] + b_c`` (section 4 of the paper): time
    O(edges O c + nodes O^2 c) where the full kernel needs O(edges O^2 c). Without a fibre basis, as
    for nodes that have one direction or none, the second step only adds the bias.
    """

    def __init__(self, width: int, basis: int, fibre: bool) -> None:
        super().__init__()
        self.spatial = nn.Linear(basis, width, bias=False)
        self.fibre = nn.Linear(basis, width, bias=False) if fibre else None
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, h: Tensor, space: Space, bases: Bases) -> Tensor:
        """Features [nodes, orientations, channels] -> the same shape."""
        return self._over_directions(self._over_neighbours(h, space, bases), bases) + self.bias

    @torch.no_grad()
    def calibrate(self, h: Tensor, space: Space, bases: Bases) -> None:
        """Scale both kernels so that each step keeps the standard deviation of its input."""
        y = self._over_neighbours(h, space, bases)
        self.spatial.weight *= _ratio(h, y)
        if self.fibre is not None:
            y = self._over_neighbours(h, space, bases)
            self.fibre.weight *= _ratio(y, self._over_directions(y, bases))

    def _over_neighbours(self, h: Tensor, space: Space, bases: Bases) -> Tensor:
        kernel = self.spatial(bases.spatial)
        y = gather_messages(kernel, h, space.senders, space.receivers)
        return y if bases.own is None else y + self.spatial(bases.own) * h

    def _over_directions(self, y: Tensor, bases: Bases) -> Tensor:
        if self.fibre is None:
            return y
        assert bases.fibre is not None
        return mix_directions(self.fibre(bases.fibre), y)


class FullConv(nn.Module):
    """``z[i,p,c] = (1/O) sum_(j, o) (W B[ij,p,o])_c h[j,o,c] + b_c``: no assumption on the kernel.

    Depth-wise, and O times as expensive as :class:`SeparableConv`.
    """

    def __init__(self, width: int, basis: int) -> None:
        super().__init__()
        self.spatial = nn.Linear(basis, width, bias=False)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, h: Tensor, space: Space, bases: Bases) -> Tensor:
        """Features [nodes, orientations, channels] -> the same shape."""
        return self._convolved(h, space, bases) + self.bias

    @torch.no_grad()
    def calibrate(self, h: Tensor, space: Space, bases: Bases) -> None:
        """Scale the kernel so that the convolution keeps the standard deviation of its input."""
        self.spatial.weight *= _ratio(h, self._convolved(h, space, bases))

    def _convolved(self, h: Tensor, space: Space, bases: Bases) -> Tensor:
        kernel = self.spatial(bases.spatial)
        z = full_messages(kernel, h, space.senders, space.receivers)
        return z if bases.own is None else z + mix_directions(self.spatial(bases.own), h)


class Block(nn.Module):
    """ConvNeXt block: ``h + g * MLP(LayerNorm(conv(h)))`` with one factor g a channel.

    Liu et al., "A ConvNet for the 2020s" (CVPR 2022). ``layer_scale`` is where g starts; with 0
    there is none.
    """

    def __init__(
        self, conv: SeparableConv | FullConv, width: int, widening: int, layer_scale: float
    ) -> None:
        super().__init__()
        self.conv = conv
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, widening * width), nn.GELU(), nn.Linear(widening * width, width)
        )
        self.scale = nn.Parameter(torch.full((width,), layer_scale)) if layer_scale else None

    def forward(self, h: Tensor, space: Space, bases: Bases) -> Tensor:
        """Features [nodes, orientations, channels] -> the same shape."""
        change = self.mlp(self.norm(self.conv(h, space, bases)))
        return h + (change if self.scale is None else self.scale * change)


def gather_messages(kernel: Tensor, h: Tensor, senders: Tensor, receivers: Tensor) -> Tensor:
    """``y[i,o,c] = sum_(edges e into i) kernel[e,o,c] h[sender(e),o,c]``."""
    return _Gather.apply(kernel, h, senders, receivers)


class _Gather(torch.autograd.Function):
    """The same in the memory of one message an edge; autograd would keep two for backward.

    A ninth less time a training step of the whole network on a CPU, where messages do not fit in
    the cache. Its backward is made of differentiable operations, for forces.
    """

    @staticmethod
    def forward(ctx: Any, kernel: Tensor, h: Tensor, senders: Tensor, receivers: Tensor) -> Tensor:
        ctx.save_for_backward(kernel, h, senders, receivers)
        messages = h.index_select(0, senders).mul_(kernel)
        return torch.zeros_like(h).index_add_(0, receivers, messages)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        kernel, h, senders, receivers = ctx.saved_tensors
        at_receivers = gradient.index_select(0, receivers)
        of_h = torch.zeros_like(h).index_add(0, senders, at_receivers * kernel)
        return at_receivers * h.index_select(0, senders), of_h, None, None


def full_messages(kernel: Tensor, h: Tensor, senders: Tensor, receivers: Tensor) -> Tensor:
    """``z[i,p,c] = (1/O) sum_(edges e into i) sum_o kernel[e,p,o,c] h[sender(e),o,c]``."""
    messages = torch.einsum("epoc,eoc->epc", kernel, h.index_select(0, senders))
    return torch.zeros_like(h).index_add(0, receivers, messages) / h.shape[1]


def mix_directions(kernel: Tensor, y: Tensor) -> Tensor:
    """``z[i,p,c] = (1/O) sum_o kernel[p,o,c] y[i,o,c]``."""
    return torch.einsum("poc,noc->npc", kernel, y) / y.shape[1]


def _ratio(wanted: Tensor, found: Tensor) -> Tensor:
    ratio = wanted.std(correction=0) / found.std(correction=0)
    if not torch.isfinite(ratio) or not ratio > 0:
        raise GeometryError(
            "the clouds given for calibration have features that do not vary, so that there is no "
            "standard deviation to keep; calibrate on a batch of ordinary ones"
        )
    return ratio
