"""The simulator against one particle at a time, its statistics, and its cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from anabranch.models.geometry import (
    GeometryError,
    charged_nbody,
    linear_motion,
    nbody,
    random_rotations,
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ANABRANCH_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer and shorter simulations."""
    for name, value in {"RECORDED": 3, "FIRST": 4, "LAST": 9, "BLOCK": 6}.items():
        monkeypatch.setattr(nbody, name, value)


def one_system(x: np.ndarray, v: np.ndarray, charges: np.ndarray) -> tuple[np.ndarray, ...]:
    """The benchmark's definition for a single system, by loops."""

    def forces() -> np.ndarray:
        found = np.zeros_like(x)
        for i in range(5):
            for j in range(5):
                if i != j:
                    apart = x[i] - x[j]
                    found[i] += charges[i] * charges[j] * apart / np.linalg.norm(apart) ** 3
        return np.clip(found, -100, 100)

    frames = []
    v = v + 0.001 * forces()
    for step in range(1, 3 * (9 + 1) + 1):
        x += 0.001 * v
        if step % 3 == 0:
            frames.append((x.copy(), v.copy()))
        v = v + 0.001 * forces()
    return *frames[4], frames[9][0]


def test_it_is_the_simulation_of_one_system_at_a_time(short: None) -> None:
    found = charged_nbody(9, seed=5)
    assert len(found) == 9
    starts = [nbody._start(np.random.default_rng([5, block])) for block in range(2)]
    for system in range(9):
        x, v, charges = (values[..., system % 6] for values in starts[system // 6])
        assert np.array_equal(charges, found.charges[system].numpy())
        np.testing.assert_allclose(np.linalg.norm(v, axis=1), 0.5)
        expected = one_system(x.copy(), v, charges)
        for name, values in zip(("positions", "velocities", "targets"), expected, strict=True):
            np.testing.assert_allclose(getattr(found, name)[system], values, atol=1e-6)


def test_strong_forces_are_clipped() -> None:
    charges = np.array([[1.0], [1], [1], [-1], [1]])
    x = np.random.default_rng(0).standard_normal((5, 3, 1)) * 10
    x[1] = x[0] + np.array([[1e-3], [0], [0]])
    forces = nbody._Forces(charges)(x)
    assert (forces[0, 0, 0], forces[1, 0, 0]) == (-100, 100)
    assert np.abs(forces[2:]).max() < 1


def test_a_larger_pool_begins_with_the_smaller_one(short: None) -> None:
    small, large = charged_nbody(4, 1), charged_nbody(13, 1)
    for name in ("charges", "positions", "velocities", "targets"):
        assert torch.equal(getattr(small, name), getattr(large, name)[:4])
    assert not torch.equal(small.positions, charged_nbody(4, 2).positions)
    assert charged_nbody(1, 1).positions.shape == (1, 5, 3)
    with pytest.raises(GeometryError, match="n = 0"):
        charged_nbody(0)


def test_it_is_read_from_the_cache_and_made_again_if_that_is_damaged(
    short: None, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = charged_nbody(4, 1)
    (file,) = (cache / "nbody").iterdir()
    with monkeypatch.context() as patched:
        patched.setattr(nbody, "_simulated", None)  # calling it would fail
        read = charged_nbody(4, 1)
        for before, after in zip(made.samples(), read.samples(), strict=True):
            assert torch.equal(before.cloud.scalars, after.cloud.scalars)
            assert torch.equal(before.target, after.target)
    file.write_bytes(file.read_bytes()[:100])
    assert torch.equal(charged_nbody(4, 1).targets, made.targets)
    assert "cannot be read" in caplog.text


def test_the_generator_has_the_benchmarks_statistics() -> None:
    """The sheet's check, on a quarter of its systems."""
    systems = charged_nbody(500, 3)
    tau, error = linear_motion(systems)
    assert 0.68 < tau < 0.79
    assert 0.06 < error < 0.11
    assert float(systems.charges.mean().abs()) < 0.1
    brute = ((systems.positions + tau * systems.velocities - systems.targets) ** 2).mean()
    assert error == pytest.approx(float(brute), rel=1e-4)
    for other in (tau - 0.05, tau + 0.05):
        worse = (systems.positions + other * systems.velocities - systems.targets) ** 2
        assert float(worse.mean()) > error


def test_samples_and_turned_systems_agree(short: None) -> None:
    systems = charged_nbody(6, 0)
    turns = random_rotations(6, 3, generator=torch.Generator().manual_seed(0))
    plain, turned = systems.samples(), systems.turned(turns).samples()
    for rotation, before, after in zip(turns, plain, turned, strict=True):
        expected = before.cloud.turned(rotation)
        assert torch.allclose(after.cloud.pos, expected.pos, atol=1e-5)
        assert after.cloud.vectors is not None
        assert expected.vectors is not None
        assert torch.allclose(after.cloud.vectors, expected.vectors, atol=1e-5)
        assert torch.allclose(after.cloud.scalars, before.cloud.scalars, atol=1e-6)
        assert torch.allclose(after.target, before.target @ rotation.T, atol=1e-5)
    assert torch.allclose(plain[2].cloud.pos + plain[2].target[:, 0], systems.targets[2])
