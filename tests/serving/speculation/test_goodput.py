"""The controller finds the lengths of the highest goodput, and never hurts for long."""

from __future__ import annotations

import random
import time
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import ConfigurationError
from anabranch.evaluation.speculation.replay import JudgedRequest, Replay, replay_judged
from anabranch.planning import CostModel
from anabranch.serving.speculation.acceptance import (
    GROUP_TRIALS,
    AcceptanceEstimator,
    RequestClass,
    expected_tokens,
)
from anabranch.serving.speculation.controller import (
    DraftCost,
    FixedLength,
    Load,
    NoSpeculation,
    SpeculationController,
)
from anabranch.serving.speculation.goodput import MEMORY_MARGIN, GoodputController
from anabranch.serving.speculation.step_cost import FEW, ROOFLINE, Step, StepCost

COST = CostModel(fixed=0.033, per_token=0.0011, per_context=1.2e-5)
"""Step times of a two-core machine in float32."""


def quarter(batch: int, context: int, k: int) -> float:
    """A draft model of a quarter of the target's layers."""
    return k * COST.predict(batch, context) / 4


def known(cost: CostModel = COST) -> CostModel:
    """A copy, which may learn."""
    return CostModel(cost.fixed, cost.per_token, cost.per_context)


def taught(
    alpha: float, draft_cost: DraftCost | None = quarter, **options: object
) -> GoodputController:
    """A controller that is sure of the acceptance."""
    return GoodputController(known(), draft_cost, prior=(alpha * 1e9, 1e9), **options)  # type: ignore[arg-type]


def goodput(
    alphas: list[float], lengths: tuple[int, ...], contexts: list[int], draft_cost: DraftCost | None
) -> float:
    """Expected tokens a second, sequence by sequence."""
    tokens = sum(float(expected_tokens(a, k)) for a, k in zip(alphas, lengths, strict=True))
    seconds = COST.predict(len(alphas) + sum(lengths), sum(contexts) + sum(lengths))
    if draft_cost is not None and any(lengths):
        drafting = [c for c, k in zip(contexts, lengths, strict=True) if k]
        seconds += draft_cost(len(drafting), sum(drafting), max(lengths))
    return tokens / seconds


# --- expected tokens and acceptance ---


@given(st.floats(0, 1), st.integers(0, 12))
def test_expected_tokens_is_the_sum_of_the_chances(alpha: float, k: int) -> None:
    assert float(expected_tokens(alpha, k)) == pytest.approx(sum(alpha**j for j in range(k + 1)))


def test_expected_tokens_against_monte_carlo() -> None:
    rng = np.random.default_rng(0)
    for alpha, k in ((0.0, 4), (0.3, 1), (0.7, 5), (0.95, 8), (1.0, 3)):
        accepted = rng.random((40_000, k)) < alpha
        tokens = 1 + np.cumprod(accepted, axis=1).sum(1)
        error = 4 * tokens.std() / 200 + 1e-9
        assert abs(tokens.mean() - float(expected_tokens(alpha, k))) <= error


def test_expected_tokens_broadcasts() -> None:
    grid = expected_tokens(np.array([[0.5], [1.0]]), np.arange(3))
    np.testing.assert_allclose(grid, [[1, 1.5, 1.75], [1, 2, 3]])


@pytest.mark.parametrize("alpha", [0.1, 0.6, 0.9])
def test_the_estimate_finds_the_acceptance_although_trials_stop_at_the_first_refusal(
    alpha: float,
) -> None:
    rng = np.random.default_rng(1)
    estimator = AcceptanceEstimator()
    found = []
    for _ in range(3000):
        estimator.next_step()
        flags = rng.random(5) < alpha
        accepted = 5 if flags.all() else int(flags.argmin())
        estimator.observe("a", accepted, accepted < 5)
        found.append(estimator.alpha("a"))
    assert np.mean(found[500:]) == pytest.approx(alpha, abs=0.02)


def test_a_step_is_forgotten_once_however_many_sequences_it_judged() -> None:
    estimator = AcceptanceEstimator(forgetting=0.5, prior=(1, 2))
    estimator.next_step()
    estimator.observe("a", 2, True)
    estimator.observe("a", 4, False)
    assert estimator.alpha("a") == (0.5 + 6) / (1 + 7)
    estimator.next_step()
    estimator.observe("a", 0, True)
    assert estimator.alpha("a") == 3.25 / 5
    assert estimator.alpha("b") == 0.5


def test_a_request_is_like_its_group_until_it_shows_otherwise() -> None:
    estimator = AcceptanceEstimator(forgetting=1.0, prior=(5, 10))
    one, other = RequestClass("g", 1), RequestClass("g", 2)
    assert estimator.alpha(one) == 0.5
    estimator.observe(one, 10, False)
    group = 15 / 20
    assert estimator.alpha("g") == estimator.alpha(other) == group
    assert estimator.alpha(one) == (10 + GROUP_TRIALS * group) / (10 + GROUP_TRIALS)
    other_group = RequestClass("h", 1)
    assert estimator.alpha(other_group) == 0.5  # one request may have good drafts and bad ones
    estimator.observe(other_group, 0, True)
    assert estimator.alpha(one) == (10 + GROUP_TRIALS * group) / (10 + GROUP_TRIALS)
    estimator.release(1)
    assert estimator.alpha(one) == group
    assert estimator.alpha(other_group) == estimator.alpha("h")


def test_nothing_judged_teaches_nothing() -> None:
    estimator = AcceptanceEstimator()
    estimator.observe("a", 0, False)
    assert estimator.alpha("a") == 0.7


# --- lengths ---


@given(
    alphas=st.lists(st.sampled_from([0.0, 0.2, 0.5, 0.8, 0.95, 1.0]), min_size=1, max_size=30),
    context=st.integers(1, 2000),
    drafts=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_the_common_length_is_the_best_by_brute_force(
    alphas: list[float], context: int, drafts: bool
) -> None:
    draft_cost = quarter if drafts else None
    controller = GoodputController(known(), draft_cost, margin=1.0, prior=(1, 1))
    for alpha in set(alphas):
        controller.acceptance._counts[alpha] = alpha, 1.0
    contexts = [context] * len(alphas)
    found = controller.lengths(alphas, Load(0, contexts))
    assert len(set(found)) == 1
    best = max(goodput(alphas, (k,) * len(alphas), contexts, draft_cost) for k in range(9))
    mine = goodput(alphas, tuple(found), contexts, draft_cost)
    assert mine == pytest.approx(best, rel=1e-9) or found[0] == 1  # a probe of nothing


@given(
    alphas=st.lists(st.floats(0, 1), min_size=1, max_size=4),
    limits=st.lists(st.integers(0, 4), min_size=4, max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_lengths_of_requests_are_the_best_by_brute_force(
    alphas: list[float], limits: list[int]
) -> None:
    controller = GoodputController(known(), None, k_max=4, margin=1.0, per_request=True)
    classes = list(range(len(alphas)))
    for of, alpha in zip(classes, alphas, strict=True):
        controller.acceptance._counts[of] = alpha, 1.0
    limits = limits[: len(alphas)]
    contexts = [100] * len(alphas)
    found = controller.lengths(classes, Load(0, contexts), limits)
    assert all(0 <= k <= limit for k, limit in zip(found, limits, strict=True))
    choices = product(*(range(limit + 1) for limit in limits))
    best = max(goodput(alphas, choice, contexts, None) for choice in choices)
    assert goodput(alphas, tuple(found), contexts, None) == pytest.approx(best, rel=1e-9)


def test_lengths_of_requests_count_a_draft_pass_once_for_all_who_take_part() -> None:
    controller = taught(0.8, per_request=True)
    batch = controller._batch(["a"] * 5, Load(0, [50] * 5), None)
    depth = np.array([0, 0, 1, 0, 1, 2])
    expected = [0.0]
    for n in range(1, 7):
        sequences = np.bincount(depth[:n])
        expected.append(sum(quarter(int(m), 50 * int(m), 1) for m in sequences))
    np.testing.assert_allclose(controller._drafting_prefixes(batch, depth), expected)


@given(
    seed=st.integers(0, 1000),
    k_max=st.integers(0, 6),
    per_request=st.booleans(),
    lookup=st.booleans(),
    free=st.one_of(st.none(), st.integers(0, 400)),
)
@settings(max_examples=80, deadline=None)
def test_lengths_never_exceed_what_is_allowed(
    seed: int, k_max: int, per_request: bool, lookup: bool, free: int | None
) -> None:
    rng = np.random.default_rng(seed)
    controller = GoodputController(
        known(), None if lookup else quarter, k_max, per_request=per_request, probe_every=3
    )
    for _ in range(30):
        size = int(rng.integers(0, 9))
        contexts = rng.integers(1, 300, size).tolist()
        available = rng.integers(0, 9, size).tolist() if lookup else None
        classes = rng.integers(0, 3, size).tolist()
        found = controller.lengths(
            classes, Load(int(rng.integers(0, 99)), contexts, free), available
        )
        assert len(found) == size
        assert all(0 <= k <= k_max for k in found)
        assert all(k <= a for k, a in zip(found, available or found, strict=True))
        if free is not None and any(found):
            wanted = sum(contexts) + size + sum(found)
            assert wanted * MEMORY_MARGIN <= sum(contexts) + free
        for of, length in zip(classes, found, strict=True):
            accepted = int(rng.integers(0, length + 1))
            controller.observe(of, accepted, accepted < length)
        controller.record(float(rng.uniform(0.0, 0.2)))


@pytest.mark.parametrize("per_request", [False, True])
def test_drafts_that_cost_nothing_get_shorter_with_load_and_longer_with_acceptance(
    per_request: bool,
) -> None:
    """At equal contexts, more sequences leave less of the step that all share."""

    def total(alpha: float, size: int) -> float:
        controller = taught(alpha, None, per_request=per_request, probe_every=10**9)
        return sum(controller.lengths(["a"] * size, Load(0, [200] * size))) / size

    sizes = [1, 2, 4, 8, 16, 32, 64, 128, 256]
    for alpha in (0.3, 0.6, 0.9):
        by_load = [total(alpha, size) for size in sizes]
        assert by_load == sorted(by_load, reverse=True)
    for size in (1, 16, 256):
        by_alpha = [total(alpha, size) for alpha in (0.0, 0.2, 0.4, 0.6, 0.8, 0.95)]
        assert by_alpha == sorted(by_alpha)
    assert total(0.9, 1) == 8
    assert total(0.3, 256) == 0


def test_prompts_in_the_step_do_not_make_drafts_look_cheap() -> None:
    alone = taught(0.5).lengths(["a"] * 4, Load(0, [100] * 4))
    assert taught(0.5).lengths(["a"] * 4, Load(250, [100] * 4)) == alone


def test_speculation_must_promise_the_margin() -> None:
    def chosen(margin: float) -> int:
        return taught(0.5, margin=margin).lengths(["a"], Load(0, [100]))[0]

    gain = max(goodput([0.5], (k,), [100], quarter) for k in range(9)) / goodput(
        [0.5], (0,), [100], quarter
    )
    assert gain > 1
    assert chosen(gain * 0.999) > 0
    assert chosen(gain * 1.001) == 0


def test_a_common_length_is_kept_for_the_update_interval() -> None:
    controller = taught(0.9, update_interval=5)
    first = controller.lengths(["a"], Load(0, [100]))
    busy = ["a"] * 200, Load(0, [100] * 200)
    assert [controller.lengths(*busy)[0] for _ in range(4)] == first * 4
    assert controller.lengths(*busy)[0] < first[0]


def test_no_sequences_no_lengths() -> None:
    controller = taught(0.9)
    assert controller.lengths([], Load(100, [])) == []
    assert controller.nodes([], Load(0, [])) == []
    assert not controller.worth_proposing([], Load(0, []))


def test_the_same_observations_give_the_same_lengths() -> None:
    assert serve(0.7, seed=3)[1].lengths == serve(0.7, seed=3)[1].lengths


# --- lookups and trees ---


def test_only_sequences_with_a_draft_count_as_drafting() -> None:
    found = taught(0.9, None).lengths(["a"] * 3, Load(0, [50] * 3), [0, 8, 2])
    assert found == [0, 8, 2]


def test_looking_up_is_given_up_where_nothing_is_found_and_tried_again() -> None:
    controller = taught(0.6, None, probe_every=10)
    classes, load = ["a"] * 16, Load(0, [100] * 16)
    assert controller.worth_proposing(classes, load)
    for _ in range(40):
        controller.lengths(classes, load, [0] * 16)
    controller._plain_steps = 0
    assert controller.match_ratio < 0.01
    assert not controller.worth_proposing(classes, load)
    controller._plain_steps = 9
    assert controller.worth_proposing(classes, load)


@given(st.lists(st.lists(st.floats(0, 1), max_size=6), min_size=1, max_size=4), st.randoms())
@settings(max_examples=60, deadline=None)
def test_the_best_nodes_of_trees_are_trees_and_the_best_by_brute_force(
    confidences: list[list[float]], rng: random.Random
) -> None:
    values: list[list[float]] = []
    parents: list[list[int]] = []
    for tree in confidences:
        above = [rng.randrange(-1, i) for i in range(len(tree))]
        worth: list[float] = []
        for node, confidence in enumerate(tree):
            worth.append(confidence * (worth[above[node]] if above[node] >= 0 else 1.0))
        values.append(worth)
        parents.append(above)
    controller = GoodputController(known(), None, margin=1.0)
    load = Load(0, [100] * len(values))
    kept = controller.nodes(values, load)
    for nodes, above in zip(kept, parents, strict=True):
        assert all(above[node] < 0 or above[node] in nodes for node in nodes)
        assert nodes == sorted(nodes)

    ordered = sorted((v for tree in values for v in tree), reverse=True)
    best = max(
        (len(values) + sum(ordered[:n])) / COST.predict(len(values) + n, 100 * len(values) + n)
        for n in range(len(ordered) + 1)
    )
    count = sum(map(len, kept))
    mine = len(values) + sum(
        tree[n] for tree, nodes in zip(values, kept, strict=True) for n in nodes
    )
    seconds = COST.predict(len(values) + count, 100 * len(values) + count)
    assert mine / seconds == pytest.approx(best, rel=1e-9)


# --- what it knows of costs ---


def test_a_wrong_draft_cost_is_found_out() -> None:
    cost = StepCost(known())
    plain = Step(4, 400, 0, 0.0)
    drafting = Step(4, 400, 12, 0.03)
    base = COST.predict(4, 400)
    added = COST.predict(16, 412) - base + 0.03
    for _ in range(FEW):
        cost.decided(plain)
        cost.observe(2 * base)  # the machine is half as fast as the model says
        cost.decided(drafting)
        cost.observe(2 * (base + 5 * added))
    assert cost.factor == pytest.approx(5.0)
    np.testing.assert_allclose(
        cost.predict(4, 400, np.array([0, 12]), np.array([0, 0.03])), [base, base + 5 * added]
    )


def test_a_stalled_step_changes_nothing() -> None:
    cost = StepCost(known())
    for at in range(16):
        for step in (Step(4, 400, 0, 0.0), Step(4, 400, 12, 0.03)):
            seconds = float(
                cost._model.predict(4 + step.drafted, 400 + step.drafted) + step.drafting
            )
            cost.decided(step)
            cost.observe(seconds * (50 if at == 7 else 1))
    assert cost.factor == pytest.approx(1.0)


def test_a_model_without_samples_is_replaced_and_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    by_roofline = GoodputController(known(ROOFLINE), None).lengths(["a"], Load(0, [10]))
    with caplog.at_level("INFO"):
        controller = GoodputController(CostModel(), None)
        for _ in range(3):
            assert controller.lengths(["a"], Load(0, [10])) == by_roofline
    assert len([r for r in caplog.records if "roofline" in r.message]) == 1


def test_a_fit_of_equal_steps_is_not_believed() -> None:
    """It cannot tell what a token costs, and may take the whole step for it."""
    model = CostModel()
    for context in range(8):
        model.observe(1, 100 + context, 0.04)
    assert model.fitted
    model.fixed, model.per_token, model.per_context = 0.0, 0.04, 0.0
    by_roofline = GoodputController(known(ROOFLINE), None).lengths(["a"], Load(0, [100]))
    assert GoodputController(model, None).lengths(["a"], Load(0, [100])) == by_roofline != [0]
    model.record(64, 100, 64 * 0.04)
    model.per_token += 1e-9  # as a fit with the new step would
    assert GoodputController(model, None).lengths(["a"], Load(0, [100])) == [0]


# --- never hurts ---


def traffic(
    alpha: float, rate: float, seed: int, requests: int = 40, found: float | None = None
) -> list[JudgedRequest]:
    """Poisson arrivals of requests of about 120 and 64 tokens."""
    rng = np.random.default_rng([seed, 5])
    made = []
    for moment in np.cumsum(rng.exponential(1 / rate, requests)):
        length = max(8, int(rng.normal(64, 12)))
        drafted = None
        if found is not None:
            drafted = np.where(rng.random(length) < found, rng.integers(1, 9, length), 0)
        accepted = rng.random(length) < alpha
        made.append(JudgedRequest(moment, max(8, int(rng.normal(120, 30))), accepted, drafted, "c"))
    return made


def served(
    requests: list[JudgedRequest],
    controller: SpeculationController,
    draft_cost: DraftCost | None,
    learned: CostModel | None = None,
    really: float = 1.0,
    seed: int = 0,
) -> Replay:
    """On a machine whose steps vary by a tenth, and where one in a hundred stalls."""
    rng = np.random.default_rng(seed)

    def seconds(tokens: int, context: int, drafting: float) -> float:
        noise = np.exp(rng.normal(0, 0.1)) * (3 if rng.random() < 0.01 else 1)
        return float((COST.predict(tokens, context) + really * drafting) * noise)

    return replay_judged(requests, controller, seconds, draft_cost, learned)


def serve(
    alpha: float,
    rate: float = 1.0,
    seed: int = 0,
    really: float = 1.0,
    found: float | None = None,
) -> tuple[Replay, Replay]:
    """Without speculation, and under a controller that starts from nothing."""
    requests = traffic(alpha, rate, seed, 15 if rate < 1 else 40, found)
    draft_cost = quarter if found is None else None
    learned = CostModel()
    controller = GoodputController.of(learned, draft_cost, 8)
    return (
        served(requests, NoSpeculation(), draft_cost, seed=seed),
        served(requests, controller, draft_cost, learned, really, seed),
    )


@pytest.mark.parametrize("rate", [0.1, 1.0, 3.0])
@pytest.mark.parametrize(
    ("alpha", "really", "found"),
    [(0.75, 4.0, None), (0.2, 1.0, None), (0.05, 1.0, 0.9), (0.3, 1.0, 0.5), (0.75, 1.0, None)],
)
def test_never_much_slower_than_without(
    alpha: float, really: float, found: float | None, rate: float
) -> None:
    """Bad drafts, drafts that take four times what was said, and any load."""
    pairs = [serve(alpha, rate, seed, really, found) for seed in range(2)]
    without, under = (float(np.mean([p[i].latency for p in pairs])) for i in (0, 1))
    assert under <= without / 0.95


def test_much_faster_where_drafts_are_good_and_the_machine_is_idle() -> None:
    without, under = serve(0.9, rate=0.1, found=0.8)
    assert under.latency < without.latency / 1.8
    without, under = serve(0.8, rate=0.1)
    assert under.latency < without.latency / 1.3


def test_speculation_comes_back_when_drafts_become_good() -> None:
    controller = GoodputController(known(), quarter)
    rng = random.Random(0)
    lengths = []
    for step in range(3000):
        alpha = 0.05 if step < 500 else 0.9
        length = controller.lengths(["a"], Load(0, [100]))[0]
        accepted = 0
        while accepted < length and rng.random() < alpha:
            accepted += 1
        controller.observe("a", accepted, accepted < length)
        lengths.append(length)
    assert sum(lengths[200:500]) <= 300 / 32 + 1
    assert np.mean(lengths[-500:]) > 2


def test_probes_take_at_most_a_hundredth_of_the_time() -> None:
    controller = taught(0.0)
    size, plain, extra = 64, 0.0, 0.0
    contexts = [200] * size
    probed = 0
    for _ in range(2000):
        lengths = controller.lengths(["a"] * size, Load(0, contexts))
        base = COST.predict(size, sum(contexts))
        plain += base
        if total := sum(lengths):
            probed += 1
            drafting = quarter(total, 200 * total, 1)
            extra += COST.predict(size + total, sum(contexts) + total) - base + drafting
    assert probed >= 10
    assert extra <= 0.0101 * plain


@pytest.mark.parametrize(("draft_cost", "available"), [(quarter, None), (None, [8] * 256)])
def test_a_decision_is_fast(draft_cost: DraftCost | None, available: list[int] | None) -> None:
    """Far below a step; the limit is ten times what it takes on an idle machine."""
    controller = GoodputController.of(known(), draft_cost, 8)
    classes = [RequestClass("a", i) for i in range(256)]
    load = Load(0, [200] * 256)
    taken = []
    for _ in range(30):
        began = time.perf_counter()
        controller.lengths(classes, load, available)
        taken.append(time.perf_counter() - began)
    assert min(taken) < 0.003


def test_a_margin_that_was_measured_is_smaller() -> None:
    """Predictions that proved right need less of it."""
    controller = taught(0.5, margin=1.3)
    load = Load(0, [100])
    assert controller.lengths(["a"], load) == [0]
    for _ in range(16):
        for step in (Step(1, 100, 0, 0.0), Step(1, 100, 3, quarter(1, 100, 3))):
            controller.step_cost.decided(step)
            seconds = COST.predict(1 + step.drafted, 100 + step.drafted) + step.drafting
            controller.record(seconds)
    assert controller.step_cost.certainty == 1
    assert controller.lengths(["a"], load)[0] > 0


# --- the other controllers, and bad options ---


def test_fixed_and_none() -> None:
    load = Load(0, [5, 5])
    assert FixedLength(3).lengths(["a", "b"], load) == [3, 3]
    assert FixedLength(3).lengths(["a", "b"], load, [1, 8]) == [1, 3]
    assert FixedLength(3).lengths([], Load(0, []), []) == []
    assert NoSpeculation().lengths(["a", "b"], load, [1, 8]) == [0, 0]
    assert not NoSpeculation().worth_proposing(["a"], load)
    assert FixedLength(3).worth_proposing(["a"], load)
    assert not FixedLength(0).worth_proposing(["a"], load)
    for controller in (FixedLength, NoSpeculation, GoodputController):
        made = controller.of(known(), None, 5)
        assert made.longest == (0 if controller is NoSpeculation else 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k_max": -1}, "k_max is -1"),
        ({"margin": 0.9}, "margin must be at least 1"),
        ({"margin": float("nan")}, "margin must be at least 1"),
        ({"probe_every": 0}, "probe_every"),
        ({"update_interval": 0}, "update_interval"),
        ({"prior": (3, 2)}, "prior"),
        ({"prior": (0, 0)}, "prior"),
        ({"forgetting": 0.0}, "forgetting"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        GoodputController(known(), None, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="k is -1"):
        FixedLength(-1)


def test_contexts_must_belong_to_the_sequences() -> None:
    with pytest.raises(ValueError, match="2 contexts do not belong to 1"):
        taught(0.5).lengths(["a"], Load(0, [1, 2]))
