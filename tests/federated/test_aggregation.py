"""Aggregation rules against the obvious computation, and against clients who mean harm."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch import registry
from anabranch.errors import ConfigurationError
from anabranch.federated.aggregation import (
    Flag,
    Krum,
    Mean,
    Median,
    MultiKrum,
    TrimmedMean,
    subspace,
)
from anabranch.federated.aggregation.gram import gram
from anabranch.federated.errors import (
    AggregationError,
    EmptyRound,
    PayloadMismatch,
    TooFewUpdates,
)
from anabranch.federated.trees import dump, load

RULES = {
    "mean": Mean(),
    "median": Median(),
    "trimmed": TrimmedMean(2),
    "krum": Krum(2),
    "multi-krum": MultiKrum(2),
    "flag": Flag(),
    "flag of pairs": Flag(regulariser=1.0),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
ROBUST = {name: rule for name, rule in RULES.items() if name != "mean"}


def rows(p=9, d=12, seed=0):
    """Updates that agree on a direction."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(d, generator=generator)
    return common + 0.3 * torch.randn(p, d, generator=generator)


@every_rule
def test_named_tensors_give_the_same_as_a_matrix(rule):
    updates = rows()
    acc = None
    for index, row in enumerate(updates):
        tensors = {"b": row[:8].reshape(2, 4), "c": row[8:]}
        acc = rule.fold(acc, tensors, 1.0, f"c{index}")
    combined = rule.finish(load(dump(acc)))  # as it is stored
    made = torch.cat([combined.tensors["b"].reshape(-1), combined.tensors["c"]])
    assert torch.allclose(made, rule(updates).update, atol=1e-6)
    assert combined.tensors["b"].shape == (2, 4)
    assert set(combined.scores) in (set(), {f"c{index}" for index in range(9)})


@every_rule
def test_identical_updates_are_their_own_aggregate(rule):
    row = torch.randn(12)
    assert torch.allclose(rule(row.repeat(9, 1)).update, row, atol=1e-6)


@every_rule
def test_the_order_of_updates_does_not_matter(rule):
    updates = rows()
    permuted = updates[torch.randperm(9, generator=torch.Generator().manual_seed(3))]
    assert torch.allclose(rule(updates).update, rule(permuted).update, atol=1e-5)


@every_rule
def test_nan_is_left_out_and_named(rule):
    updates = rows(10)
    updates[4, 3] = math.nan
    acc = None
    for index, row in enumerate(updates):
        acc = rule.fold(acc, {"x": row}, 1.0, f"c{index}")
    combined = rule.finish(acc)
    assert combined.removed == ("c4",)
    clean = torch.cat([updates[:4], updates[5:]])
    assert torch.allclose(combined.tensors["x"], rule(clean).update, atol=1e-6)


@every_rule
def test_nothing_to_combine(rule):
    with pytest.raises(EmptyRound):
        rule.finish(None)
    with pytest.raises(EmptyRound):
        rule.finish(rule.fold(None, {"x": torch.ones(2)}, 0.0, "a"))
    with pytest.raises(EmptyRound):
        rule.finish(rule.fold(None, {"x": torch.full((2,), math.inf)}, 1.0, "a"))


@pytest.mark.parametrize(
    "rule",
    [TrimmedMean(2), Krum(2), MultiKrum(1, keep=7)],
    ids=["trimmed mean", "krum", "multi-krum"],
)
def test_too_few_updates_are_counted(rule):
    with pytest.raises(TooFewUpdates, match=rf"at least {rule.minimum} updates.*there are 4"):
        rule(rows(4))
    assert rule(rows(rule.minimum)).update.shape == (12,)


def test_other_shapes_name_the_client():
    rule = Median()
    acc = rule.fold(None, {"x": torch.ones(2)}, 1, "a")
    acc = rule.fold(acc, {"x": torch.ones(3)}, 1, "b")
    with pytest.raises(PayloadMismatch, match=r"reply of b: x should be a tensor .2., but is"):
        rule.finish(acc)


def test_the_mean_of_one_is_exactly_that_one():
    """For any number of examples: products of a float32 and a count are exact in float64."""
    for examples in (1, 3, 7, 1437, 10**6 + 3):
        x = torch.randn(1000)
        combined = Mean().finish(Mean().fold(None, {"x": x}, examples, "a"))
        assert torch.equal(combined.tensors["x"], x)
        acc = None
        for client in "abcde":
            acc = Mean().fold(acc, {"x": x}, examples, client)
        assert torch.equal(Mean().finish(acc).tensors["x"], x)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=9), st.integers(1, 8))
def test_means_of_parts_are_the_mean_of_all(weights, cut):
    updates = [
        torch.randn(4, generator=torch.Generator().manual_seed(i)) for i in range(len(weights))
    ]
    rule, flat, parts = Mean(), None, [None, None]
    for index, (row, weight) in enumerate(zip(updates, weights, strict=True)):
        flat = rule.fold(flat, {"x": row}, weight, "")
        parts[index >= cut] = rule.fold(parts[index >= cut], {"x": row}, weight, "")
    there = [part for part in parts if part is not None]
    merged = there[0] if len(there) == 1 else rule.merge(*there)
    if not sum(weights):
        with pytest.raises(EmptyRound):
            rule.finish(merged)
        return
    expected = sum(w * u.double() for w, u in zip(weights, updates, strict=True)) / sum(weights)
    assert torch.allclose(rule.finish(merged).tensors["x"], expected.float())
    assert torch.equal(rule.finish(merged).tensors["x"], rule.finish(flat).tensors["x"])


@pytest.mark.parametrize("p", [1, 2, 5, 6])
def test_median_by_hand(p):
    updates = rows(p)
    expected = [
        (sorted(column)[(p - 1) // 2] + sorted(column)[p // 2]) / 2 for column in updates.T.tolist()
    ]
    assert torch.allclose(Median()(updates).update, torch.tensor(expected))


@pytest.mark.parametrize("bad", [0, 1, 3])
def test_trimmed_mean_by_hand(bad):
    updates = rows(8)
    expected = []
    for column in updates.T.tolist():
        inner = sorted(column)[bad : 8 - bad]
        expected.append(sum(inner) / len(inner))
    assert torch.allclose(TrimmedMean(bad)(updates).update, torch.tensor(expected))


@pytest.mark.parametrize(("p", "bad"), [(5, 1), (9, 2), (11, 4)])
def test_krum_by_hand(p, bad):
    updates = rows(p).double()
    scores = []
    for i in range(p):
        distances = sorted(
            float((updates[i] - updates[j]).square().sum()) for j in range(p) if j != i
        )
        scores.append(sum(distances[: p - bad - 2]))
    best = min(range(p), key=scores.__getitem__)
    made = Krum(bad)(updates)
    assert torch.equal(made.update, updates[best])
    assert torch.allclose(-made.scores, torch.tensor(scores, dtype=torch.float64), rtol=1e-9)
    chosen = sorted(range(p), key=scores.__getitem__)[: p - bad - 2]
    assert torch.allclose(MultiKrum(bad)(updates).update, updates[chosen].mean(0))


def test_krum_tells_close_updates_apart_in_float32():
    """Differences of a millionth of the length drown in float32 inner products."""
    base = 1000 * torch.randn(50, generator=torch.Generator().manual_seed(0))
    updates = torch.stack([base + 1e-3 * i * torch.ones(50) for i in (0, 1, 2, 3, 30)])
    scores = Krum(1)(updates).scores
    assert int(scores.argmax()) in (1, 2) and int(scores.argmin()) == 4


# Flag


def by_svd(updates, rank, regulariser=0.0, iterations=5, epsilon=1e-7):
    """The algorithm in the full space, with an SVD of n x p matrices."""
    unit = (updates / updates.norm(dim=1, keepdim=True)).double().T  # [d, p]
    p = unit.shape[1]
    pairs = [unit[:, i] - unit[:, j] for i in range(p) for j in range(p) if i != j]
    columns = [*unit.T]
    base = [1.0] * p
    if regulariser:
        columns += [pair / pair.norm() for pair in pairs]
        base += [regulariser / (p * (p - 1))] * len(pairs)
    columns, base = torch.stack(columns, 1), torch.tensor(base, dtype=torch.float64)
    weight, best, history = torch.ones(len(base)).double(), None, []
    for _ in range(iterations):
        y = torch.linalg.svd(columns * (base * weight).sqrt(), full_matrices=False).U[:, :rank]
        v = (y.T @ columns).square().sum(0).clamp(0, 1)
        objective = float((base * (1 - v).sqrt()).sum())
        if history and objective > history[-1]:
            break
        gained = history[-1] - objective if history else math.inf
        best = y
        history.append(objective)
        if gained < 1e-10:
            break
        weight = (1 - v + epsilon).rsqrt()
    return unit, best, history


@pytest.mark.parametrize(("rank", "regulariser"), [(1, 0), (5, 0), (8, 0), (4, 0.5), (3, 5.0)])
def test_flag_equals_the_svd_in_the_full_space(rank, regulariser):
    updates = rows(9, 40) + 0.5 * torch.randn(9, 40, generator=torch.Generator().manual_seed(8))
    unit, y, history = by_svd(updates, rank, regulariser)
    k = unit.T @ unit
    found = subspace(k, rank, regulariser)
    mine = unit @ found.basis
    assert torch.allclose(mine.T @ mine, torch.eye(rank).double(), atol=1e-9)
    assert torch.allclose(mine @ mine.T, y @ y.T, atol=1e-6)
    assert found.history == pytest.approx(history)
    assert list(found.history) == sorted(found.history, reverse=True)
    mean = y @ (y.T @ unit.sum(1)) / 9
    rule = Flag(rank=rank, regulariser=regulariser, rescale="none")
    assert torch.allclose(rule(updates).update.double(), mean, atol=1e-6)
    reference = Flag(rank=rank, regulariser=regulariser, rescale="none", divide_by="m")
    assert torch.allclose(reference(updates).update.double(), mean * 9 / rank, atol=1e-6)
    scaled = Flag(rank=rank, regulariser=regulariser)(updates).update.double()
    assert torch.allclose(scaled, mean * updates.norm(dim=1).quantile(0.5).double(), atol=1e-5)


def test_reweighting_really_happens():
    updates = torch.randn(15, 60, generator=torch.Generator().manual_seed(2))
    unit = updates / updates.norm(dim=1, keepdim=True)
    history = subspace(gram(unit), 8).history
    assert len(history) == 5
    assert all(later < earlier for earlier, later in itertools.pairwise(history))


def test_flag_ignores_lengths():
    updates = rows()
    longer = updates.clone()
    longer[2] *= 1000
    one, other = Flag()(updates).update, Flag()(longer).update
    assert torch.allclose(one / one.norm(), other / other.norm(), atol=1e-5)


def test_flag_of_full_rank_is_the_mean_of_directions():
    updates = rows(5, 12)
    unit = updates / updates.norm(dim=1, keepdim=True)
    made = Flag(rank=5, rescale="none")(updates)
    assert torch.allclose(made.update, unit.mean(0), atol=1e-5)
    assert torch.allclose(made.scores, torch.ones(5).double())


def test_flag_of_one_two_and_none_but_zero():
    updates = rows(2)
    assert torch.equal(Flag()(updates[:1]).update, updates[0])
    unit = updates / updates.norm(dim=1, keepdim=True)
    two = Flag(rescale="none")(updates).update
    assert torch.allclose(two, unit.mean(0), atol=1e-6)
    assert torch.equal(Flag()(torch.zeros(3, 4)).update, torch.zeros(4))
    with_zero = Flag()(torch.cat([updates, torch.zeros(1, 12)]))
    assert with_zero.scores[2] == 0
    assert torch.allclose(with_zero.update, Flag()(updates).update, atol=1e-6)


def test_flag_weights_count_only_if_asked():
    updates, weights = rows(), torch.arange(1.0, 10.0)
    assert torch.equal(Flag()(updates, weights).update, Flag()(updates).update)
    assert not torch.allclose(Flag(weighted=True)(updates, weights).update, Flag()(updates).update)
    even = Flag(weighted=True)(updates, torch.full((9,), 3.0))
    assert torch.allclose(even.update, Flag()(updates).update, atol=1e-6)


def test_flag_options_that_cannot_work():
    for options in ({"rank": 0}, {"regulariser": -1.0}, {"iterations": 0}, {"rescale": "x"}):
        with pytest.raises(ConfigurationError):
            Flag(**options)
    with pytest.raises(ConfigurationError, match="at most 64"):
        Flag(regulariser=1.0)(torch.randn(65, 3))
    with pytest.raises(AggregationError, match=r"updates \[0, 1\]"):
        subspace(torch.full((2, 2), math.nan).double(), 1)


def test_inner_products_in_chunks():
    updates = torch.randn(4, 1000)
    assert torch.allclose(gram(updates, chunk=64), updates.double() @ updates.double().T)


# Attacks

ATTACKS = {
    "random": lambda bad, honest, g: torch.rand(bad.shape, generator=g) * 100,
    "sign flip": lambda bad, honest, g: -10 * bad,
    "large": lambda bad, honest, g: torch.full_like(bad, 1e6),
    "little is enough": lambda bad, honest, g: (honest.mean(0) - 1.0 * honest.std(0)).expand_as(
        bad
    ),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
@pytest.mark.parametrize("rule", ROBUST.values(), ids=ROBUST)
def test_two_bad_of_eleven_do_not_turn_a_robust_rule(rule, attack):
    generator = torch.Generator().manual_seed(5)
    common = torch.randn(200, generator=generator)
    updates = common + 0.5 * torch.randn(11, 200, generator=generator)
    honest = updates[2:]
    updates[:2] = attack(updates[:2].clone(), honest, generator)
    made = rule(updates)
    similarity = torch.cosine_similarity(made.update, honest.mean(0), dim=0)
    assert similarity > 0.85
    if attack is not ATTACKS["little is enough"] and made.scores is not None:
        assert made.scores[:2].max() < made.scores[2:].min() or rule.name == "flag"


def test_the_mean_is_turned_by_one():
    updates = rows()
    updates[0] = -1e6
    assert torch.cosine_similarity(Mean()(updates).update, rows().mean(0), dim=0) < 0.5


def test_aggregators_are_found_by_name():
    assert set(registry.available("aggregators")) >= {
        "mean",
        "median",
        "trimmed_mean",
        "krum",
        "multi_krum",
        "flag",
    }
