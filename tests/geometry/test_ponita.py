"""The network as a whole: shapes, presets, calibration, saving, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from anabranch.errors import UnknownName
from anabranch.models.geometry import (
    EGNN,
    EGNNConfig,
    GeometryError,
    PointCloud,
    Ponita,
    PonitaConfig,
    collate,
    complete_edges,
    orientation_grid,
    radius_edges,
)
from anabranch.training.point_clouds import preset
from anabranch.training.point_clouds.presets import PRESETS
from tests.geometry.clouds import cloud_of, default_dtype, egnn, ponita


def test_shapes_of_outputs() -> None:
    cloud = cloud_of()
    output = ponita()(cloud)
    assert (output.scalars.shape, output.vectors.shape) == ((13, 3), (13, 2, 3))
    pooled = ponita(pool="sum")(cloud)
    assert (pooled.scalars.shape, pooled.vectors.shape) == ((3, 3), (3, 2, 3))
    plain = ponita(orientations=0)(cloud_of(vectors=None))
    assert (plain.scalars.shape, plain.vectors.shape) == ((13, 3), (13, 0, 3))
    moved = egnn()(cloud)
    assert (moved.scalars.shape, moved.vectors.shape) == ((13, 3), (13, 1, 3))


def test_positions_alone_work_in_any_dimension() -> None:
    with pytest.raises(GeometryError, match=r"dimension = 5: directions are there in 2 and 3"):
        ponita(dimension=5)
    model = ponita(dimension=5, orientations=0)
    assert model(cloud_of(dimension=5, vectors=None)).scalars.shape == (13, 3)


@pytest.mark.parametrize("options", [{}, {"pool": "mean"}, {"pool": "sum"}, {"radius": 1.0}])
@pytest.mark.parametrize("orientations", [12, -1, 0])
def test_no_points_give_no_output(orientations: int, options: dict[str, Any]) -> None:
    model = ponita(orientations=orientations, **({} if options.get("radius") else options))
    vectors = None if orientations == 0 else torch.zeros(0, 2, 3).double()
    output = model(PointCloud(torch.zeros(0, 3).double(), torch.zeros(0, 2).double(), vectors))
    assert output.scalars.shape == (0, 3)
    assert len(output.vectors) == 0
    none = PointCloud(
        torch.zeros(0, 3).double(), torch.zeros(0, 2).double(), torch.zeros(0, 2, 3).double()
    )
    assert egnn()(none).vectors.shape == (0, 1, 3)


def test_a_point_alone_sees_itself() -> None:
    """Its output is a function of its own features, wherever it is."""
    for mode in (0, 12):
        model = ponita(orientations=mode)
        cloud = cloud_of((1,), vectors=None if mode == 0 else 2)
        output = model(cloud)
        assert torch.isfinite(output.scalars).all()
        beside = ponita(orientations=mode, radius=1e-3)
        assert torch.allclose(beside(cloud).scalars, beside(cloud.shifted(torch.ones(3))).scalars)


def test_pooling_is_over_the_points_of_a_cloud() -> None:
    cloud = cloud_of()
    each, total, mean = (ponita(pool=pool)(cloud) for pool in (None, "sum", "mean"))
    # Calibration reads the same features in all three, so the networks are one.
    for number, size in enumerate((5, 1, 7)):
        own = cloud.batch == number
        for kind in ("scalars", "vectors"):
            expected = getattr(each, kind)[own].sum(0)
            assert torch.allclose(getattr(total, kind)[number], expected, atol=1e-12)
            assert torch.allclose(getattr(mean, kind)[number], expected / size, atol=1e-12)


def test_given_edges_are_the_ones_that_count() -> None:
    model = ponita(radius=1.5)
    cloud = cloud_of()
    near = radius_edges(cloud.pos, cloud.batch, 1.5)
    linked = PointCloud(cloud.pos, cloud.scalars, cloud.vectors, cloud.batch, near)
    assert torch.equal(model(cloud).vectors, model(linked).vectors)
    everywhere = PointCloud(
        cloud.pos, cloud.scalars, cloud.vectors, cloud.batch, complete_edges(cloud.batch)
    )
    # Beyond the radius the kernel is zero, whether or not there is an edge.
    assert torch.allclose(model(cloud).vectors, model(everywhere).vectors, atol=1e-12)
    none = torch.zeros(2, 0, dtype=torch.int64)
    lonely = PointCloud(cloud.pos, cloud.scalars, cloud.vectors, cloud.batch, none)
    assert not torch.allclose(model(cloud).vectors, model(lonely).vectors)


def test_what_is_beyond_the_radius_has_no_effect() -> None:
    model = ponita(radius=2.0)
    near, far = cloud_of((4,)), cloud_of((4,), seed=1).shifted(torch.full((3,), 50.0))
    joined = collate([near, far])
    both = PointCloud(joined.pos, joined.scalars, joined.vectors)
    assert torch.allclose(model(both).vectors[:4], model(near).vectors, atol=1e-12)


def test_calibration_keeps_deviations_through_the_layers() -> None:
    with default_dtype(torch.float64):
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"width": 16, "basis": 8, "layers": 3, "orientations": 12}
        model = Ponita(PonitaConfig(scalars_in=2, vectors_in=2, **sizes))
        cloud = cloud_of((6, 6))
        grads = [p.grad for p in model.parameters()]
        model.calibrate(cloud)
        assert grads == [p.grad for p in model.parameters()]
        space, bases, h = model._start(cloud)
        for block in model.blocks:
            changed = block.conv(h, space, bases) - block.conv.bias
            torch.testing.assert_close(changed.std(correction=0), h.std(correction=0))
            h = block(h, space, bases)
        before = {n: p.clone() for n, p in model.named_parameters()}
        model.calibrate(cloud)
        for name, parameter in model.named_parameters():
            assert torch.allclose(parameter, before[name], rtol=1e-9), f"{name}: not idempotent"
    with pytest.raises(GeometryError, match="do not vary"):
        zeros = torch.zeros(3, 2, 3).double()
        model.calibrate(PointCloud(cloud.pos[:3], cloud.scalars[:3] * 0, zeros))


def test_blocks_start_as_the_identity_and_have_no_scale_if_asked() -> None:
    assert all(float(b.scale.detach().max()) == pytest.approx(1e-6) for b in _fresh().blocks)
    assert all(block.scale is None for block in _fresh(layer_scale=0.0).blocks)
    assert len(_fresh(multiple_readouts=False).readouts) == 1
    assert len(_fresh().readouts) == 2


def test_read_outs_are_averaged() -> None:
    model = ponita(multiple_readouts=True)
    cloud = cloud_of()
    with torch.no_grad():
        for readout in model.readouts:
            readout.weight.zero_()
            readout.bias.zero_()
        for number, readout in enumerate(model.readouts):
            readout.bias[:3] = float(number + 1)
    assert torch.allclose(model(cloud).scalars, torch.full((13, 3), 1.5).double())


def test_the_claims_network_has_as_many_parameters_as_published_by_the_sheet() -> None:
    sizes = {"orientations": 12, "width": 32, "basis": 32, "layers": 3}
    model = Ponita(PonitaConfig(scalars_in=2, vectors_in=2, scalars_out=0, vectors_out=1, **sizes))
    assert model.num_parameters() == 34_531
    peer = EGNN(EGNNConfig(scalars_in=2, vectors_in=2))
    assert peer.num_parameters() == 134_088


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("orientations", [12, 0, -1, 7])
def test_saved_and_loaded_bit_for_bit(
    orientations: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = ponita(dtype, orientations=orientations, grid="auto")
    model.save_pretrained(tmp_path)
    loaded = Ponita.from_pretrained(tmp_path)
    assert torch.equal(loaded.grid, model.grid)
    cloud = cloud_of(vectors=None if orientations == 0 else 2, dtype=dtype, sizes=(4, 5))
    for kind in ("scalars", "vectors"):
        assert torch.equal(getattr(loaded(cloud), kind), getattr(model(cloud), kind))
    assert json.loads((tmp_path / "config.json").read_text())["orientations"] == orientations


def test_egnn_is_saved_and_loaded_bit_for_bit(tmp_path: Path) -> None:
    model = egnn()
    model.save_pretrained(tmp_path)
    cloud = cloud_of()
    assert torch.equal(EGNN.from_pretrained(tmp_path)(cloud).vectors, model(cloud).vectors)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_sheets_and_run(name: str) -> None:
    found = preset(name)
    model = Ponita(found.model(layers=1, width=4, basis=4))
    cloud = cloud_of((3,), model.config.dimension, scalars=1, vectors=None, dtype=torch.float32)
    assert torch.isfinite(model(cloud).scalars).all()
    options = found.training()
    assert (options.lr, options.batch) == (found.lr, found.batch)
    assert found.training(steps=7).total_steps(10) == 7
    orientations = {"nbody": 16, "rmd17": 20, "mnist": 10, "qm9": 16}
    assert found.model().orientations == orientations[name]


def test_unknown_presets_are_named() -> None:
    with pytest.raises(UnknownName, match="did you mean 'nbody'"):
        preset("nbod")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"orientations": 0, "vectors_in": 1}, "vectors_in = 1 with orientations=0"),
        ({"orientations": 0, "vectors_in": 0, "vectors_out": 1}, "vectors_out = 1 with orient"),
        ({"orientations": 3}, "3 orientations in 3D cannot represent a vector"),
        ({"orientations": 1}, "1 orientations in 3D"),
        ({"dimension": 2, "orientations": 2}, "2 orientations in 2D"),
        ({"orientations": -2}, "orientations = -2: use a number of directions"),
        ({"dimension": 4}, "dimension = 4"),
        ({"dimension": 1, "orientations": -1}, "dimension = 1"),
        ({"radius": 0.0}, "radius = 0.0"),
        ({"radius": -2.0}, "radius = -2.0"),
        ({"width": 0}, "width = 0"),
        ({"layers": 0}, "layers = 0"),
        ({"degree": 0}, "degree = 0"),
        ({"scalars_in": -1}, "cannot be negative"),
        ({"scalars_in": 0, "vectors_in": 0}, "no features go in"),
        ({"scalars_out": 0, "vectors_out": 0}, "nothing comes out"),
        ({"extra_invariant": True}, "set separable=False"),
        ({"grid": "cube"}, "grid = 'cube'"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GeometryError, match=message):
        _fresh(**changes)


@pytest.mark.parametrize(
    ("config", "name", "message"),
    [
        (PonitaConfig, "widht", r"PonitaConfig has no option 'widht' \(did you mean 'width'"),
        (PonitaConfig, "heads", r"no option 'heads'.*it has dimension, orientations"),
        (EGNNConfig, "orientations", r"EGNNConfig has no option 'orientations'"),
    ],
)
def test_unknown_options_are_refused_by_name(config: Any, name: str, message: str) -> None:
    with pytest.raises(GeometryError, match=message):
        config(**{name: 3})
    again = config.from_dict(config(width=5).to_dict())
    assert again.width == 5, "what transformers writes beside the options is taken back"


def test_clouds_that_do_not_fit_are_refused() -> None:
    model, cloud = ponita(), cloud_of()
    for wrong, message in (
        (cloud_of(dimension=2), "the cloud is 2D, the model 3D"),
        (cloud_of(scalars=5), "the cloud has 5 scalars, the model 2"),
        (cloud_of(vectors=None), "the cloud has 0 vectors a point, the model takes 2"),
        (cloud_of(vectors=1), "1 vectors a point, the model takes 2"),
        (cloud.to(torch.float32), "the cloud is torch.float32, the model torch.float64"),
    ):
        with pytest.raises(GeometryError, match=message):
            model(wrong)
    with pytest.raises(GeometryError, match="2 vectors a point, the model takes 0"):
        ponita(orientations=0)(cloud)
    with pytest.raises(GeometryError, match="5 scalars"):
        egnn()(cloud_of(scalars=5))
    with pytest.raises(GeometryError, match="at least 1"):
        EGNN(EGNNConfig(width=0))


def test_edge_mode_names_points_without_a_direction() -> None:
    cloud = cloud_of((4,))
    pos = cloud.pos.clone()
    pos[3] = pos[1]
    with pytest.raises(GeometryError, match=r"points (3 and 1|1 and 3) are at the same place"):
        ponita(orientations=-1)(PointCloud(pos, cloud.scalars, cloud.vectors))
    with pytest.raises(GeometryError, match="point 5 has no neighbour"):
        ponita(orientations=-1)(cloud_of((5, 1)))


def test_a_turned_grid_is_put_back_after_an_error() -> None:
    model = ponita()
    with pytest.raises(ZeroDivisionError), model.turned_grid(torch.eye(3).flip(0)):
        assert not torch.equal(model.grid, torch.from_numpy(orientation_grid(12)))
        _ = 1 / 0
    assert torch.equal(model.grid, torch.from_numpy(orientation_grid(12)))


def _fresh(**changes: Any) -> Ponita:
    sizes = {"width": 4, "basis": 4, "layers": 2, "orientations": 8}
    return Ponita(PonitaConfig(**{**sizes, **changes}))
