"""EGNN, the baseline: messages from distances, positions moved along differences.

Satorras, Hoogeboom and Welling, "E(n) Equivariant Graph Neural Networks" (ICML 2021), with the
velocities of its section 3.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from anabranch.models.geometry.config import GeometryConfig
from anabranch.models.geometry.errors import GeometryError
from anabranch.models.geometry.point_cloud import PointCloud, edges_of, without_loops
from anabranch.models.geometry.ponita import GeometryOutput, require_features


class EGNNConfig(GeometryConfig):
    """What an :class:`EGNN` is made of. The first of ``vectors_in`` is the velocity."""

    model_type = "egnn"

    scalars_in: int = 1
    vectors_in: int = 0
    scalars_out: int = 0
    width: int = 64
    layers: int = 4
    radius: float | None = None


class EGNN(PreTrainedModel):
    """Exactly equivariant to rotations, reflections, shifts and permutations, in any dimension.

    When to use it: as a baseline, or where the answer is one vector a point in the span of
    differences and velocity. Known problem: messages know distances only.

    ``forward`` gives every point's displacement as its one vector.
    """

    config_class = EGNNConfig
    config: EGNNConfig
    base_model_prefix = "egnn"
    main_input_name = "cloud"

    def __init__(self, config: EGNNConfig) -> None:
        if min(config.width, config.layers, config.scalars_in) < 1 or config.vectors_in < 0:
            raise GeometryError("EGNN needs width, layers and scalars_in of at least 1")
        super().__init__(config)
        self.embedding = nn.Linear(config.scalars_in, config.width)
        self.layers = nn.ModuleList(
            _Layer(config.width, config.scalars_in, moves=bool(config.vectors_in))
            for _ in range(config.layers)
        )
        self.readout = (
            _mlp(config.width, config.width, config.scalars_out) if config.scalars_out else None
        )
        self.post_init()

    def forward(self, cloud: PointCloud) -> GeometryOutput:
        """Scalars [points, scalars_out] and displacements [points, 1, D]."""
        c = self.config
        require_features(cloud, c.scalars_in, c.vectors_in)
        senders, receivers = without_loops(edges_of(cloud, c.radius))
        given = cloud.scalars[receivers] * cloud.scalars[senders]  # charges attract or repel
        h, x = self.embedding(cloud.scalars), cloud.pos
        velocity = None if cloud.vectors is None else cloud.vectors[:, 0]
        for layer in self.layers:
            h, x = layer(h, x, velocity, given, senders, receivers)
        scalars = h.new_zeros(len(h), 0) if self.readout is None else self.readout(h)
        return GeometryOutput(scalars, (x - cloud.pos).unsqueeze(1))

    def _init_weights(self, module: Any) -> None:
        """Every module has initialised itself."""


class _Layer(nn.Module):
    """Equations 3 to 7 of the paper."""

    def __init__(self, width: int, given: int, moves: bool) -> None:
        super().__init__()
        self.message = nn.Sequential(_mlp(2 * width + 1 + given, width, width), nn.SiLU())
        self.along = _mlp(width, width, 1)
        self.velocity = _mlp(width, width, 1) if moves else None
        self.update = _mlp(2 * width, width, width)
        last: Any = self.along[-1]
        nn.init.xavier_uniform_(last.weight, gain=0.001)  # positions hardly move at first

    def forward(
        self,
        h: Tensor,
        x: Tensor,
        velocity: Tensor | None,
        given: Tensor,
        senders: Tensor,
        receivers: Tensor,
    ) -> tuple[Tensor, Tensor]:
        difference = x[receivers] - x[senders]
        squares = (difference * difference).sum(-1, keepdim=True)
        pair = torch.cat([h[receivers], h[senders], squares, given], dim=-1)
        messages = self.message(pair)  # [edges, width]
        pushes = difference * self.along(messages)
        counts = torch.bincount(receivers, minlength=len(x)).clamp(min=1).unsqueeze(-1)
        x = x + torch.zeros_like(x).index_add(0, receivers, pushes) / counts
        if self.velocity is not None and velocity is not None:
            x = x + self.velocity(h) * velocity
        gathered = h.new_zeros(len(h), messages.shape[1]).index_add(0, receivers, messages)
        return h + self.update(torch.cat([h, gathered], dim=-1)), x


def _mlp(inputs: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, outputs))
