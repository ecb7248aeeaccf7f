"""PONITA: equivariant networks by sharing kernels over classes of point pairs.

Bekkers, Vadgama, Hesselink, van der Linden and Romero, "Fast, Expressive SE(n) Equivariant Networks
through Weight-Sharing in Position-Orientation Space" (ICLR 2024).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from anabranch.models.geometry.config import GeometryConfig
from anabranch.models.geometry.convolution import (
    Bases,
    Block,
    FullConv,
    KernelBasis,
    SeparableConv,
    bounded,
)
from anabranch.models.geometry.errors import GeometryError
from anabranch.models.geometry.grids import Grid, orientation_grid
from anabranch.models.geometry.point_cloud import PointCloud, edges_of, require_radius
from anabranch.models.geometry.spaces import (
    Space,
    edge_space,
    grid_space,
    lift,
    point_space,
    read_out,
)

POSITIONS, EDGES = 0, -1
"""Values of ``orientations`` that are no number of directions."""


class PonitaConfig(GeometryConfig):
    """What a :class:`Ponita` is made of; checked when the model is.

    ``orientations`` > 0 is the size of the grid of directions. 0 is positions only: invariant, and
    no vectors can go in or out. -1 makes a node of every edge, which is exactly equivariant.

    ``radius`` bounds how far points see, None is the whole cloud. ``basis`` and ``degree`` are of
    the kernel bases. ``layer_scale`` is where the factors on the blocks' output start; 0 leaves
    them out. ``separable=False`` takes one kernel over position and both directions, with
    ``extra_invariant`` also the distance along the sender's direction. ``pool`` reads out one
    result a cloud and not a point.
    """

    model_type = "ponita"

    dimension: int = 3
    orientations: int = 16
    grid: str = "auto"
    grid_seed: int = 0
    scalars_in: int = 1
    vectors_in: int = 0
    scalars_out: int = 1
    vectors_out: int = 0
    width: int = 128
    basis: int = 256
    layers: int = 5
    degree: int = 3
    widening: int = 4
    layer_scale: float = 1e-6
    radius: float | None = None
    separable: bool = True
    extra_invariant: bool = False
    multiple_readouts: bool = True
    pool: Literal["mean", "sum"] | None = None

    def check(self) -> None:
        """Raise :class:`GeometryError` for values that cannot work, alone or together."""
        for name in ("width", "basis", "layers", "degree", "widening"):
            if getattr(self, name) < 1:
                raise GeometryError(f"{name} = {getattr(self, name)}: it must be at least 1")
        for name in ("scalars_in", "vectors_in", "scalars_out", "vectors_out"):
            if getattr(self, name) < 0:
                raise GeometryError(f"{name} = {getattr(self, name)}: it cannot be negative")
        if not self.scalars_in + self.vectors_in:
            raise GeometryError("no features go in: set scalars_in or vectors_in")
        if not self.scalars_out + self.vectors_out:
            raise GeometryError("nothing comes out: set scalars_out or vectors_out")
        if self.radius is not None:
            require_radius(self.radius)
        if self.orientations < EDGES:
            raise GeometryError(
                f"orientations = {self.orientations}: use a number of directions, {POSITIONS} for "
                f"positions only or {EDGES} for edge mode"
            )
        if self.orientations != POSITIONS and self.dimension not in (2, 3):
            raise GeometryError(
                f"dimension = {self.dimension}: directions are there in 2 and 3 only; positions "
                f"alone (orientations=0) work in any"
            )
        if self.orientations == POSITIONS and self.vectors_in + self.vectors_out:
            what = "vectors_in" if self.vectors_in else "vectors_out"
            raise GeometryError(
                f"{what} = {getattr(self, what)} with orientations=0: without directions there are "
                f"no vectors; use a grid, or edge mode (-1)"
            )
        if self.extra_invariant and self.separable and self.orientations != EDGES:
            raise GeometryError(
                "extra_invariant joins position and the sender's direction, which a separable "
                "kernel keeps apart; set separable=False"
            )


@dataclass(frozen=True)
class GeometryOutput:
    """Of each point, or of each cloud if the model pools."""

    scalars: Tensor
    """[points, channels]; rotations do not change them."""
    vectors: Tensor
    """[points, channels, dimension]; they turn with the cloud."""


class Ponita(PreTrainedModel):
    """A message passing network over point clouds whose features are functions on directions.

    When to use it: scalars and vectors of points in 2D or 3D whose axes mean nothing, at a fraction
    of the cost of networks of spherical harmonics. Known problems: on a grid it is equivariant
    exactly only to shifts, permutations and the symmetries of the grid
    (:func:`~anabranch.models.geometry.grids.grid_symmetries`); any other rotation leaves an error
    that training on turned clouds makes small and :func:`~.equivariance.equivariance_error`
    measures. ``orientations`` 0 and -1 are exact.

    Example::

        model = Ponita(PonitaConfig(scalars_in=2, vectors_in=1, vectors_out=1))
        model.calibrate(cloud)  # once, on the first batch
        output = model(cloud)   # output.vectors [points, 1, 3]

    ``save_pretrained`` and ``from_pretrained`` are those of transformers.
    """

    config_class = PonitaConfig
    config: PonitaConfig
    base_model_prefix = "ponita"
    main_input_name = "cloud"
    grid: Tensor

    def __init__(self, config: PonitaConfig) -> None:
        config.check()
        super().__init__(config)
        c = config
        directions = torch.empty(0, c.dimension)
        if c.orientations > 0:
            kind: Grid = c.grid  # type: ignore[assignment]  # checked by orientation_grid
            grid = orientation_grid(c.orientations, c.dimension, c.grid_seed, kind)
            directions = torch.tensor(grid, dtype=torch.get_default_dtype())
        self.register_buffer("grid", directions)
        fibre = c.orientations > 0 and c.separable
        self.spatial_basis = KernelBasis(_invariants_of(c), c.degree, c.basis)
        self.fibre_basis = KernelBasis(1, c.degree, c.basis) if fibre else None
        self.embedding = nn.Linear(c.scalars_in + c.vectors_in, c.width, bias=False)
        full = c.orientations > 0 and not c.separable
        self.blocks = nn.ModuleList(
            Block(
                FullConv(c.width, c.basis) if full else SeparableConv(c.width, c.basis, fibre),
                c.width,
                c.widening,
                c.layer_scale,
            )
            for _ in range(c.layers)
        )
        outputs = c.scalars_out + c.vectors_out
        self.readouts = nn.ModuleList(
            nn.Linear(c.width, outputs) for _ in range(c.layers if c.multiple_readouts else 1)
        )
        self.post_init()

    def forward(self, cloud: PointCloud) -> GeometryOutput:
        """Scalars and vectors of every point, or every cloud.

        Raises :class:`GeometryError` if the cloud's features are not those of the configuration.
        """
        space, bases, h = self._start(cloud)
        readouts = []
        for block in self.blocks:
            h = block(h, space, bases)
            readouts.append(h)
        if not self.config.multiple_readouts:
            readouts = readouts[-1:]
        features = sum(f(h) for f, h in zip(self.readouts, readouts, strict=True)) / len(readouts)
        scalars, vectors = read_out(features, space, self.config.scalars_out)
        return GeometryOutput(self._pooled(scalars, cloud), self._pooled(vectors, cloud))

    @torch.no_grad()
    def calibrate(self, cloud: PointCloud) -> None:
        """Scale all kernels so that features keep their standard deviation through every layer.

        Once, before the first step, on a batch of the training data: a pass of its own, because
        weights that change between forward and backward give wrong gradients.
        """
        space, bases, h = self._start(cloud)
        for block in self.blocks:
            conv: Any = block.conv
            conv.calibrate(h, space, bases)
            h = block(h, space, bases)

    @contextmanager
    def turned_grid(self, rotation: Tensor) -> Iterator[None]:
        """Inside, every direction of the grid is turned by the matrix [D, D]."""
        before = self.grid
        self.grid = before @ rotation.to(before).T
        try:
            yield
        finally:
            self.grid = before

    def _start(self, cloud: PointCloud) -> tuple[Space, Bases, Tensor]:
        """The cloud's geometry, the kernel bases on it, and the first layer's input."""
        c = self.config
        self._require_fitting(cloud)
        space = self._space(cloud)
        spatial = bounded(self.spatial_basis(space.spatial), space.distance, c.radius)
        own = None if space.own is None else self.spatial_basis(space.own)
        fibre = None if self.fibre_basis is None else self.fibre_basis(space.fibre)
        h = self.embedding(lift(cloud.scalars, cloud.vectors, space))
        return space, Bases(spatial, own, fibre), h

    def _space(self, cloud: PointCloud) -> Space:
        c = self.config
        edges = edges_of(cloud, c.radius)
        if c.orientations == POSITIONS:
            return point_space(cloud, edges)
        if c.orientations == EDGES:
            return edge_space(cloud, edges, c.extra_invariant)
        return grid_space(cloud, edges, self.grid, c.separable, c.extra_invariant)

    def _pooled(self, values: Tensor, cloud: PointCloud) -> Tensor:
        if self.config.pool is None:
            return values
        clouds = cloud.num_clouds
        total = values.new_zeros(clouds, *values.shape[1:]).index_add(0, cloud.batch, values)
        if self.config.pool == "sum":
            return total
        counts = torch.bincount(cloud.batch, minlength=clouds).clamp(min=1)
        return total / counts.view(-1, *[1] * (values.ndim - 1))

    def _require_fitting(self, cloud: PointCloud) -> None:
        c = self.config
        if cloud.dimension != c.dimension:
            raise GeometryError(f"the cloud is {cloud.dimension}D, the model {c.dimension}D")
        require_features(cloud, c.scalars_in, c.vectors_in)
        if cloud.pos.dtype != self.embedding.weight.dtype:
            raise GeometryError(
                f"the cloud is {cloud.pos.dtype}, the model {self.embedding.weight.dtype}; convert "
                f"one of them with .to(dtype)"
            )

    def _init_weights(self, module: Any) -> None:
        """Every module has initialised itself, as in the authors' code."""


def require_features(cloud: PointCloud, scalars: int, vectors: int) -> None:
    """Raise :class:`GeometryError` unless the cloud has so many channels of each kind."""
    found = 0 if cloud.vectors is None else cloud.vectors.shape[1]
    if cloud.scalars.shape[1] != scalars:
        raise GeometryError(f"the cloud has {cloud.scalars.shape[1]} scalars, the model {scalars}")
    if found != vectors:
        raise GeometryError(f"the cloud has {found} vectors a point, the model takes {vectors}")


def _invariants_of(config: PonitaConfig) -> int:
    """How many invariants the spatial basis sees."""
    if config.orientations == POSITIONS:
        return 1
    if config.orientations > 0 and config.separable:
        return 2
    return 3 + config.extra_invariant
