"""Random clouds and small networks that the tests share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from anabranch.models.geometry import EGNN, EGNNConfig, PointCloud, Ponita, PonitaConfig

DTYPES = (torch.float32, torch.float64)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11}
"""Of outputs of the order of one."""


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def cloud_of(
    sizes: tuple[int, ...] = (5, 1, 7),
    dimension: int = 3,
    scalars: int = 2,
    vectors: int | None = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> PointCloud:
    """Normally distributed points, several clouds in a batch."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(sizes)

    def draw(*shape: int) -> Tensor:
        return torch.randn(n, *shape, generator=generator, dtype=dtype)

    batch = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    drawn = draw(vectors, dimension) if vectors is not None else None
    return PointCloud(draw(dimension), draw(scalars), drawn, batch)


def ponita(dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> Ponita:
    """A small network without layer scale, so that its blocks count, calibrated."""
    settings: dict[str, Any] = {
        "scalars_in": 2,
        "vectors_in": 2,
        "scalars_out": 3,
        "vectors_out": 2,
        "width": 8,
        "basis": 6,
        "layers": 2,
        "orientations": 12,
        "layer_scale": 0.0,
    }
    if changes.get("orientations") == 0:
        settings |= {"vectors_in": 0, "vectors_out": 0}
    settings |= changes
    with torch.random.fork_rng(), default_dtype(dtype):
        torch.manual_seed(seed)
        model = Ponita(PonitaConfig(**settings))
    vectors = settings["vectors_in"] or None
    dimension = settings.get("dimension", 3)
    model.calibrate(cloud_of((6, 6, 6), dimension, vectors=vectors, seed=99, dtype=dtype))
    return model.eval()


def egnn(dtype: torch.dtype = torch.float64, **changes: Any) -> EGNN:
    settings: dict[str, Any] = {"scalars_in": 2, "vectors_in": 2, "scalars_out": 3, "width": 8}
    with torch.random.fork_rng(), default_dtype(dtype):
        torch.manual_seed(0)
        model = EGNN(EGNNConfig(**settings | changes)).eval()
        for layer in model.layers:  # so that positions move by more than rounding
            torch.nn.init.normal_(layer.along[-1].weight, std=0.1)
    return model


def permuted(cloud: PointCloud, order: Tensor) -> PointCloud:
    vectors = None if cloud.vectors is None else cloud.vectors[order]
    assert cloud.edges is None
    return PointCloud(cloud.pos[order], cloud.scalars[order], vectors, cloud.batch[order])


sizes = st.lists(st.integers(2, 6), min_size=1, max_size=4).map(tuple)
seeds = st.integers(0, 2**31)
