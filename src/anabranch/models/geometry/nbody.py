"""Charged particles: where are they a thousand steps later?

The benchmark of Kipf et al. (ICML 2018) in the variant in 3D of Fuchs et al. (NeurIPS 2020) and
Satorras et al. (ICML 2021), simulated for many systems at once. Nothing is downloaded.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anabranch.files import replacing
from anabranch.models.cache import root
from anabranch.models.geometry.errors import GeometryError
from anabranch.models.geometry.point_cloud import PointCloud, turn
from anabranch.models.progress import Progress, silent
from anabranch.training.point_clouds.objective import Sample

logger = logging.getLogger(__name__)

PARTICLES = 5
SPEED = 0.5
"""Of every particle at the start."""
STEP = 0.001
RECORDED = 100
"""Steps between two frames; frame f is step 100 (f + 1)."""
FIRST, LAST = 30, 40
"""Frames that go in, and are to be predicted."""
STRONGEST = 100.0
"""Bound of every component of a force."""

BLOCK = 250
"""Systems that are simulated together, always so many: another width would round differently, and
close encounters amplify that. Small enough for the processor's cache."""

TRAIN, VALIDATION, TEST = 3000, 2000, 2000
POOL_SEED = 43
_FORMAT = 1

Array = NDArray[np.float64]


@dataclass(frozen=True)
class ChargedSystems:
    """``n`` systems of five particles, float32: what goes in (frame 30) and the answer (frame 40).

    System i depends on the seed and i only, so that a larger pool begins with the smaller one.
    """

    charges: Tensor
    """[n, 5]: 1 or -1."""
    positions: Tensor
    """[n, 5, 3]"""
    velocities: Tensor
    """[n, 5, 3]"""
    targets: Tensor
    """[n, 5, 3]: the positions ten frames later."""

    def __len__(self) -> int:
        return len(self.charges)

    def samples(self) -> list[Sample]:
        """Clouds with charge and speed as scalars, velocity and place in the system as vectors.

        The answer is each particle's displacement.
        """
        centred = self.positions - self.positions.mean(1, keepdim=True)
        scalars = torch.stack([self.charges, self.velocities.norm(dim=-1)], dim=-1)
        vectors = torch.stack([self.velocities, centred], dim=2)
        displacements = (self.targets - self.positions).unsqueeze(2)
        parts = zip(self.positions, scalars, vectors, displacements, strict=True)
        return [Sample(PointCloud(p, s, v), answer) for p, s, v, answer in parts]

    def turned(self, rotations: Tensor) -> ChargedSystems:
        """Every system turned about the origin by its own matrix [n, 3, 3]."""
        systems = torch.arange(len(self))
        kinds = (self.positions, self.velocities, self.targets)
        return ChargedSystems(self.charges, *(turn(v, rotations, systems) for v in kinds))


def charged_nbody(n: int, seed: int = 0, progress: Progress = silent) -> ChargedSystems:
    """Simulate ``n`` systems, or read them if that was done before on this machine."""
    if n < 1:
        raise GeometryError(f"n = {n}: simulate at least one system")
    path = root() / "nbody" / f"charged-{_FORMAT}-{n}-{seed}.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            return ChargedSystems(*(torch.from_numpy(file[f.name]) for f in fields(ChargedSystems)))
    except FileNotFoundError:
        pass
    except Exception as error:  # zip and numpy each raise their own
        logger.warning("%s cannot be read and is made again: %s", path, error)
    blocks = []
    for block in range(-(-n // BLOCK)):
        progress(f"simulating {n:,} systems", block * BLOCK / n)
        blocks.append(_simulated(np.random.default_rng([seed, block])))
    # In C order: sums over another layout round differently, and the cache would not give it back.
    arrays = [
        np.ascontiguousarray(np.concatenate(parts)[:n], np.float32)
        for parts in zip(*blocks, strict=True)
    ]
    named: dict[str, Any] = dict(
        zip((field.name for field in fields(ChargedSystems)), arrays, strict=True)
    )
    with replacing(Path(path)) as draft, draft.open("wb") as out:
        np.savez(out, **named)
    return ChargedSystems(*map(torch.from_numpy, arrays))


def linear_motion(systems: ChargedSystems) -> tuple[float, float]:
    """Time scale tau of the best x + tau v, and its mean squared error."""
    moved = (systems.targets - systems.positions).double()
    v = systems.velocities.double()
    tau = float((v * moved).sum() / (v * v).sum())
    return tau, float(((moved - tau * v) ** 2).mean())


def _simulated(generator: np.random.Generator) -> tuple[Array, Array, Array, Array]:
    """Charges, positions, velocities and targets of one block of systems."""
    x, v, charges = _start(generator)
    forces = _Forces(charges)
    v += STEP * forces(x)
    positions = velocities = x
    for step in range(1, RECORDED * (LAST + 1) + 1):
        x += STEP * v
        if step == RECORDED * (FIRST + 1):
            positions, velocities = x.copy(), v.copy()
        v += STEP * forces(x)
    return charges.T, _by_system(positions), _by_system(velocities), _by_system(x)


def _start(generator: np.random.Generator) -> tuple[Array, Array, Array]:
    """Positions and velocities [5, 3, systems], charges [5, systems]."""
    charges = generator.choice([-1.0, 1.0], (BLOCK, PARTICLES)).T.copy()
    x = generator.standard_normal((BLOCK, PARTICLES, 3)) * (PARTICLES / 5) ** (1 / 3)
    v = generator.standard_normal((BLOCK, PARTICLES, 3))
    v *= SPEED / np.linalg.norm(v, axis=-1, keepdims=True)
    return x.transpose(1, 2, 0).copy(), v.transpose(1, 2, 0).copy(), charges


class _Forces:
    """Coulomb forces [5, 3, systems] at positions of the same shape; every pair once."""

    def __init__(self, charges: Array) -> None:
        first, second = np.triu_indices(PARTICLES, 1)
        self._difference = np.zeros((len(first), PARTICLES))
        self._difference[range(len(first)), first] = 1
        self._difference[range(len(first)), second] = -1
        self._products = charges[first] * charges[second]

    def __call__(self, x: Array) -> Array:
        flat = x.reshape(PARTICLES, -1)
        apart = (self._difference @ flat).reshape(-1, 3, x.shape[-1])  # [pairs, 3, systems]
        squares = (apart * apart).sum(axis=1)
        apart *= (self._products / (squares * np.sqrt(squares)))[:, None]
        forces = self._difference.T @ apart.reshape(len(apart), -1)
        return np.clip(forces, -STRONGEST, STRONGEST).reshape(x.shape)


def _by_system(values: Array) -> Array:
    return values.transpose(2, 0, 1)
