"""Invariants, lifting, reading out and convolutions against loops and formulas."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from anabranch.models.geometry import (
    GeometryError,
    PointCloud,
    complete_edges,
    invariants,
    orientation_grid,
    random_rotations,
)
from anabranch.models.geometry.convolution import (
    Bases,
    FullConv,
    SeparableConv,
    bounded,
    full_messages,
    gather_messages,
    mix_directions,
)
from anabranch.models.geometry.invariants import length, polynomial, smooth_cutoff
from anabranch.models.geometry.point_cloud import turn
from anabranch.models.geometry.spaces import edge_space, grid_space, lift, point_space, read_out
from tests.geometry.clouds import cloud_of, default_dtype, seeds, sizes


def unit(*shape: int, generator: torch.Generator) -> torch.Tensor:
    drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(drawn, dim=-1)


@pytest.mark.parametrize("dimension", [2, 3])
@given(seed=seeds)
def test_invariants_do_not_change_with_a_rigid_motion(dimension: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    relative = torch.randn(20, dimension, generator=generator, dtype=torch.float64)
    o, p = (unit(20, dimension, generator=generator) for _ in range(2))
    rotation = random_rotations(
        1, dimension, reflections=dimension == 3, generator=generator, dtype=torch.float64
    )[0]
    for arguments in ((relative,), (relative, o), (relative, o, p)):
        before = invariants(*arguments, extra=len(arguments) == 3)
        after = invariants(*(a @ rotation.T for a in arguments), extra=len(arguments) == 3)
        assert torch.allclose(before, after, atol=1e-12)


def test_invariants_are_those_of_the_table() -> None:
    r, o, p = torch.tensor([3.0, 4, 12]), torch.tensor([0.0, 0, 1]), torch.tensor([1.0, 0, 0])
    assert invariants(r).tolist() == [13]
    assert invariants(r, o).tolist() == [12, 5]
    assert invariants(r, o, p, extra=True).tolist() == [12, 5, 0, 3]
    flat, east = torch.tensor([3.0, 4]), torch.tensor([1.0, 0])
    assert invariants(flat, east).tolist() == [3, 4]
    assert invariants(flat * torch.tensor([1, -1]), east).tolist() == [3, -4]  # signed


def test_the_length_of_nothing_has_no_gradient_of_any_order() -> None:
    x = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(length(x).sum(), x, create_graph=True)
    assert torch.equal(first, torch.zeros_like(x))
    (second,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(second, torch.zeros_like(x))
    y = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(length, y)


def test_polynomial_features_and_their_number() -> None:
    assert polynomial(torch.tensor([2.0, 3.0]), 3).tolist() == [
        *(2, 3),
        *(4, 6, 6, 9),
        *(8, 12, 12, 18, 12, 18, 18, 27),
    ]
    assert polynomial(torch.tensor([2.0]), 3).tolist() == [2, 4, 8]


def test_the_cutoff_is_smooth() -> None:
    x = torch.linspace(0, 3, 3001, dtype=torch.float64, requires_grad=True)
    y = smooth_cutoff(x, 2.0)
    assert float(y.detach()[0]) == 1
    assert float(y.detach()[2000:].abs().max()) == 0
    assert bool((y.detach()[1:] <= y.detach()[:-1] + 1e-15).all())
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), x)
    assert float(slope[1999].abs().detach()) < 1e-3
    assert float(bend[1999].abs()) < 0.2
    assert float(y.detach()[500]) == pytest.approx(1 - 28 * 0.25**6 + 48 * 0.25**7 - 21 * 0.25**8)
    spatial = torch.ones(3001, 4, 2)
    assert torch.equal(bounded(spatial, x, None), spatial)
    assert torch.equal(bounded(spatial, x, 2.0)[2000:], torch.zeros(1001, 4, 2).double())


@pytest.mark.parametrize(("orientations", "dimension"), [(12, 3), (20, 3), (3, 2), (7, 2)])
def test_lifting_and_reading_out_gives_a_share_of_the_vector(
    orientations: int, dimension: int
) -> None:
    cloud = cloud_of(dimension=dimension)
    grid = torch.from_numpy(orientation_grid(orientations, dimension))
    space = grid_space(cloud, complete_edges(cloud.batch), grid)
    lifted = lift(cloud.scalars, cloud.vectors, space)
    assert lifted.shape == (13, orientations, 4)
    scalars, vectors = read_out(lifted, space, 2)
    assert torch.allclose(scalars, cloud.scalars, atol=1e-14)
    assert cloud.vectors is not None
    assert torch.allclose(vectors, cloud.vectors / dimension, atol=1e-14)


def test_edge_mode_lifts_along_edges_and_averages_back() -> None:
    pos = torch.tensor([[0.0, 0, 0], [2, 0, 0], [0, 5, 0]]).double()
    v = torch.arange(9.0).double().view(3, 1, 3)
    cloud = PointCloud(pos, pos[:, :1] + 1, v, edges=torch.tensor([[1, 2, 0, 0], [0, 0, 1, 2]]))
    assert cloud.edges is not None
    space = edge_space(cloud, cloud.edges)
    assert space.directions is not None
    assert space.directions[:, 0].tolist() == [[1, 0, 0], [0, 1, 0], [-1, 0, 0], [0, -1, 0]]
    # Points 1 and 2 do not see each other. 0: two nodes, which see themselves and 1's and 2's.
    seen = set(zip(space.senders.tolist(), space.receivers.tolist(), strict=True))
    assert seen == {(s, r) for s in range(4) for r in range(4)} - {(2, 3), (3, 2)}
    lifted = lift(cloud.scalars, cloud.vectors, space)
    assert lifted[:, 0].tolist() == [[1, 0], [1, 1], [3, -3], [1, -7]]
    scalars, vectors = read_out(lifted, space, 1)
    assert scalars.tolist() == [[1], [3], [1]]
    assert vectors[:, 0].tolist() == [[0, 0.5, 0], [3, 0, 0], [0, 7, 0]]


@settings(max_examples=20)
@given(sizes, seeds)
def test_messages_are_those_of_two_loops(counts: tuple[int, ...], seed: int) -> None:
    torch.manual_seed(seed)
    cloud = cloud_of(counts, seed=seed)
    senders, receivers = complete_edges(cloud.batch)
    n, edges, o, c = cloud.num_points, len(senders), 4, 3
    h = torch.randn(n, o, c).double()
    kernel, full = torch.randn(edges, o, c).double(), torch.randn(edges, o, o, c).double()
    gathered, mixed = torch.zeros_like(h), torch.zeros_like(h)
    for e in range(edges):
        i, j = int(receivers[e]), int(senders[e])
        for p in range(o):
            gathered[i, p] += kernel[e, p] * h[j, p]
            for q in range(o):
                mixed[i, p] += full[e, p, q] * h[j, q] / o
    assert torch.allclose(gather_messages(kernel, h, senders, receivers), gathered, atol=1e-12)
    assert torch.allclose(full_messages(full, h, senders, receivers), mixed, atol=1e-12)


def test_messages_have_the_gradients_of_autograd_of_both_orders() -> None:
    """The function with a backward of its own, against finite differences."""
    senders, receivers = torch.tensor([[0, 1, 1, 2, 0], [1, 0, 2, 1, 1]])
    torch.manual_seed(0)
    kernel = torch.randn(5, 2, 2, dtype=torch.float64, requires_grad=True)
    h = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda k, x: gather_messages(k, x, senders, receivers), (kernel, h))


@settings(max_examples=15)
@given(sizes, seeds)
def test_a_separable_kernel_is_a_full_kernel_that_is_a_product(
    counts: tuple[int, ...], seed: int
) -> None:
    torch.manual_seed(seed)
    cloud = cloud_of(counts, seed=seed)
    grid = torch.from_numpy(orientation_grid(12))
    space = grid_space(cloud, complete_edges(cloud.batch), grid)
    spatial, fibre = torch.randn(len(space.senders), 12, 3), torch.randn(12, 12, 3)
    own = torch.randn(3)
    h = torch.randn(cloud.num_points, 12, 3)
    with torch.no_grad():
        separable, full = SeparableConv(3, 3, fibre=True), FullConv(3, 3)
        assert separable.fibre is not None
        for layer in (separable.spatial, separable.fibre, full.spatial):
            layer.weight.copy_(torch.eye(3))  # the bases are the kernels
        product = torch.einsum("eoc,poc->epoc", spatial, fibre)
        expected = full(h, space, Bases(product, own * fibre, None))
        found = separable(h, space, Bases(spatial, own, fibre))
    assert torch.allclose(found, expected, atol=1e-4)


@settings(max_examples=15)
@given(sizes, seeds)
def test_loops_that_are_no_edges_are_loops(counts: tuple[int, ...], seed: int) -> None:
    """Every node's own message is computed once; with an edge for each it is the same."""
    torch.manual_seed(seed)
    cloud = cloud_of(counts, seed=seed)
    grid = torch.from_numpy(orientation_grid(8))
    space = grid_space(cloud, complete_edges(cloud.batch), grid)
    senders, receivers = complete_edges(cloud.batch, loop=True)
    relative = cloud.pos[senders] - cloud.pos[receivers]
    with_loops = invariants(relative[:, None], grid)
    assert space.own is not None
    h = torch.randn(cloud.num_points, 8, 2).double()
    expected = gather_messages(with_loops.cos(), h, senders, receivers)
    found = gather_messages(space.spatial.cos(), h, space.senders, space.receivers)
    assert torch.allclose(found + space.own.cos() * h, expected, atol=1e-12)


def test_given_loops_do_not_count_twice() -> None:
    cloud = cloud_of((4,))
    for space_of in (point_space, edge_space):
        plain = space_of(cloud, complete_edges(cloud.batch))
        looped = space_of(cloud, complete_edges(cloud.batch, loop=True))
        assert torch.equal(plain.senders, looped.senders)
        assert torch.equal(plain.spatial, looped.spatial)


def test_mixing_directions() -> None:
    kernel, y = torch.randn(5, 5, 2).double(), torch.randn(3, 5, 2).double()
    expected = torch.zeros(3, 5, 2).double()
    for p in range(5):
        for o in range(5):
            expected[:, p] += kernel[p, o] * y[:, o] / 5
    assert torch.allclose(mix_directions(kernel, y), expected)


def test_calibration_keeps_the_standard_deviation() -> None:
    with default_dtype(torch.float64):
        torch.manual_seed(0)
        cloud = cloud_of((6, 6))
        grid = torch.from_numpy(orientation_grid(12))
        space = grid_space(cloud, complete_edges(cloud.batch), grid)
        conv = SeparableConv(4, 5, fibre=True)
        bases = Bases(torch.randn(60, 12, 5), torch.randn(5), torch.randn(12, 12, 5))
        h = 7 * torch.randn(12, 12, 4)
        conv.calibrate(h, space, bases)
        y = conv._over_neighbours(h, space, bases)
        z = conv(h, space, bases) - conv.bias
        for step in (y, z):
            torch.testing.assert_close(step.std(correction=0), h.std(correction=0))
        with pytest.raises(GeometryError, match="features that do not vary"):
            conv.calibrate(torch.zeros_like(h), space, bases)


def test_turning_vectors_of_several_clouds() -> None:
    cloud = cloud_of((2, 1, 3))
    rotations = random_rotations(3, 3, dtype=torch.float64)
    assert cloud.vectors is not None
    found = turn(cloud.vectors, rotations, cloud.batch)
    for point, owner in enumerate(cloud.batch.tolist()):
        for channel in range(2):
            expected = rotations[owner] @ cloud.vectors[point, channel]
            assert torch.allclose(found[point, channel], expected)
