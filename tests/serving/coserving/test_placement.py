from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import ConfigurationError
from anabranch.serving.coserving.layer_shape import (
    IA3,
    Bottleneck,
    Bypass,
    LayerShape,
    Lora,
    TrainedBias,
)
from anabranch.serving.coserving.placement import (
    Candidate,
    Compute,
    Convert,
    Hardware,
    Site,
    State,
    network,
    plan_placement,
    sent,
)

Array = np.ndarray
Shards = list[Array]

bypasses = st.one_of(
    st.builds(Lora, st.integers(1, 8)),
    st.builds(
        Bottleneck,
        st.integers(1, 8),
        st.sampled_from(["tanh", "relu", "identity"]),
        st.sampled_from(["series_output", "parallel"]),
    ),
    st.builds(IA3, st.sampled_from(["output", "input"])),
)
plans = st.sampled_from(["column", "row", "replicated", "data"])
sites = st.builds(Site, st.integers(1, 4).map(lambda n: 4 * n), st.sampled_from([4, 8, 12]), plans)
LLAMA_8B = LayerShape(
    hidden=4096,
    intermediate=14336,
    heads=32,
    kv_heads=8,
    head_dim=128,
    layers=32,
    vocabulary=128256,
)


# A machine of plain arrays


def lay_out(x: Array, state: State, devices: int) -> Shards:
    """The tensor in a state; the summands of a partial sum are random."""
    if state is State.TOKENS:
        return np.array_split(x, devices, axis=0)
    if state is State.FEATURES:
        return np.split(x, devices, axis=1)
    if state is State.PARTIAL:
        noise = np.random.default_rng(0).normal(size=(devices - 1, *x.shape))
        return [*noise, x - noise.sum(0)]
    return [x.copy() for _ in range(devices)]


def whole(shards: Shards, state: State) -> Array:
    if state is State.TOKENS:
        return np.concatenate(shards, axis=0)
    if state is State.FEATURES:
        return np.concatenate(shards, axis=1)
    if state is State.PARTIAL:
        return np.sum(shards, axis=0)
    for shard in shards[1:]:
        np.testing.assert_array_equal(shard, shards[0])
    return shards[0]


class Machine:
    """Runs the steps of a candidate and counts what each device sends."""

    def __init__(self, devices: int, weights: dict[str, Array]) -> None:
        self.devices, self.weights, self.sent = devices, weights, 0.0

    def run(self, candidate: Candidate, shards: Shards) -> Shards:
        for step in candidate.steps:
            if isinstance(step, Convert):
                shards = getattr(self, "_" + step.kind.replace("-", "_"))(shards, step)
            else:
                shards = [self._compute(step, x, device) for device, x in enumerate(shards)]
        return shards

    def _compute(self, step: Compute, x: Array, device: int) -> Array:
        if step.part.kind == "activation":
            return {"tanh": np.tanh, "relu": lambda z: np.maximum(z, 0)}[step.part.name](x)
        weight = self.weights[step.part.name]  # [out, in], or [features]
        axis = {"outputs": 0, "inputs": 1, "features": 0}.get(step.weight)
        if axis is not None:
            weight = np.split(weight, self.devices, axis=axis)[device]
        return x * weight if step.part.kind == "scale" else x @ weight.T

    # Every collective is put together from what the devices hold, never from the whole tensor.

    def _slice(self, shards: Shards, step: Convert) -> Shards:
        return [lay_out(own, step.after, self.devices)[device] for device, own in enumerate(shards)]

    def _mask(self, shards: Shards, step: Convert) -> Shards:
        return [own if device == 0 else np.zeros_like(own) for device, own in enumerate(shards)]

    def _pad(self, shards: Shards, step: Convert) -> Shards:
        axis = 0 if step.before is State.TOKENS else 1
        padded = []
        for device in range(self.devices):
            rows = [s if i == device else np.zeros_like(s) for i, s in enumerate(shards)]
            padded.append(np.concatenate(rows, axis=axis))
        return padded

    def _all_gather(self, shards: Shards, step: Convert) -> Shards:
        full = whole(shards, step.before)
        # In a ring each device passes on all parts but one.
        self.sent += full.size * (self.devices - 1) / self.devices
        return [full.copy() for _ in range(self.devices)]

    def _all_to_all(self, shards: Shards, step: Convert) -> Shards:
        pieces = [lay_out(own, step.after, self.devices) for own in shards]
        axis = 0 if step.before is State.TOKENS else 1
        self.sent += shards[0].size * (self.devices - 1) / self.devices
        return [np.concatenate(row, axis=axis) for row in zip(*pieces, strict=True)]

    def _reduce_scatter(self, shards: Shards, step: Convert) -> Shards:
        self.sent += shards[0].size * (self.devices - 1) / self.devices
        pieces = [lay_out(own, step.after, self.devices) for own in shards]
        return [np.sum(row, axis=0) for row in zip(*pieces, strict=True)]

    def _all_reduce(self, shards: Shards, step: Convert) -> Shards:
        self.sent += 2 * shards[0].size * (self.devices - 1) / self.devices
        total = np.sum(shards, axis=0)
        return [total.copy() for _ in range(self.devices)]


def base_states(plan: str, devices: int) -> tuple[State, State]:
    """In which state the module's input and its product with the weight are."""
    if devices == 1:
        return State.REPLICATED, State.REPLICATED
    return {
        "column": (State.REPLICATED, State.FEATURES),
        "row": (State.FEATURES, State.PARTIAL),
        "replicated": (State.REPLICATED, State.REPLICATED),
        "data": (State.TOKENS, State.TOKENS),
    }[plan]


def base_product(x: Shards, weight: Array, plan: str, devices: int) -> Shards:
    axis = {"column": 0, "row": 1}.get(plan)
    parts = [weight] * devices if axis is None else np.split(weight, devices, axis=axis)
    return [shard @ part.T for shard, part in zip(x, parts, strict=True)]


def simulate(
    bypass: Bypass,
    site: Site,
    candidate: Candidate,
    devices: int,
    x: Array,
    w: Array,
    machine: Machine,
) -> Array:
    """The adapted module on all devices: base, bypass, and the base's own all-reduce."""
    before, after = base_states(site.plan, devices)
    inputs = lay_out(x, before, devices)
    if isinstance(bypass, IA3) and bypass.on == "input":
        inputs = machine.run(candidate, inputs)
        return whole(base_product(inputs, w, site.plan, devices), after)
    y = base_product(inputs, w, site.plan, devices)
    if site.plan == "row" and candidate.writes is State.REPLICATED and devices > 1:
        y, after = [np.sum(y, axis=0)] * devices, State.REPLICATED  # the base's own all-reduce
    assert candidate.writes is after
    if isinstance(bypass, IA3):
        return whole(machine.run(candidate, y), after)
    series = isinstance(bypass, Bottleneck) and bypass.place == "series_output"
    delta = machine.run(candidate, y if series else inputs)
    for own, extra in zip(y, delta, strict=True):
        assert own.shape == extra.shape
    return whole([own + extra for own, extra in zip(y, delta, strict=True)], after)


def reference(bypass: Bypass, x: Array, w: Array, weights: dict[str, Array]) -> Array:
    y = x @ w.T
    if isinstance(bypass, IA3):
        scale = weights["scale"]
        return (x * scale) @ w.T if bypass.on == "input" else y * scale
    if isinstance(bypass, Lora):
        return y + x @ weights["A"].T @ weights["B"].T
    act = {"tanh": np.tanh, "relu": lambda z: np.maximum(z, 0), "identity": lambda z: z}
    source = y if bypass.place == "series_output" else x
    return y + act[bypass.activation](source @ weights["down"].T) @ weights["up"].T


@settings(max_examples=80, deadline=None)
@given(bypasses, sites, st.sampled_from([1, 2, 4]), st.integers(1, 9), st.integers(0, 10**6))
def test_every_candidate_computes_the_adapted_module(bypass, site, devices, tokens, seed):
    random = np.random.default_rng(seed)
    x, w = (
        random.normal(size=(tokens, site.inputs)),
        random.normal(size=(site.outputs, site.inputs)),
    )
    weights = {
        part.name: random.normal(
            size=(part.outputs,) if part.kind == "scale" else (part.outputs, part.inputs)
        )
        for part in network(bypass, site)
        if part.kind != "activation"
    }
    expected = reference(bypass, x, w, weights)
    placement = plan_placement(bypass, site, devices, tokens, bits=64)
    assert placement.candidates
    for candidate in placement.candidates:
        machine = Machine(devices, weights)
        actual = simulate(bypass, site, candidate, devices, x, w, machine)
        np.testing.assert_allclose(actual, expected, atol=1e-9, err_msg=candidate.describe())
        if tokens % devices == 0:  # with ragged parts, devices send different amounts
            assert machine.sent * 8 == pytest.approx(candidate.cost.moved)


def local_sizes(candidate: Candidate, tokens: int, devices: int) -> tuple[float, float]:
    """FLOPs and bytes (64 bits) of the first device, from the shapes of its arrays."""

    def local(features: int, state: State) -> tuple[int, int]:
        return lay_out(np.empty((tokens, features)), state, devices)[0].shape

    flops = held = 0.0
    for index, step in enumerate(candidate.steps):
        features = step.features if isinstance(step, Convert) else step.part.outputs
        rows, columns = local(features, step.after)
        if isinstance(step, Compute):
            if step.part.kind == "linear":
                wide = local(step.part.inputs, step.before)[1]
                flops += 2 * rows * columns * wide
                held += wide * columns * 8
            else:
                flops += rows * columns
                held += columns * 8 if step.part.kind == "scale" else 0
        if index < len(candidate.steps) - 1:
            held += rows * columns * 8
    return flops, held


@settings(max_examples=80, deadline=None)
@given(bypasses, sites, st.sampled_from([1, 2, 4]), st.integers(1, 64))
def test_costs_are_those_of_the_arrays(bypass, site, devices, tokens):
    hardware = Hardware(flops=3.0, bandwidth=5.0, latency=7.0, memory_bandwidth=11.0)
    placement = plan_placement(bypass, site, devices, tokens, bits=64, hardware=hardware)
    for candidate in placement.candidates:
        cost = candidate.cost
        flops, held = local_sizes(candidate, tokens, devices)
        assert (cost.flops, cost.memory) == (flops, held)
        kinds = [step.kind for step in candidate.steps if isinstance(step, Convert)]
        assert cost.collectives == sum(kind not in ("slice", "mask", "pad") for kind in kinds)
        seconds = flops / 3 + cost.moved / 5 + cost.collectives * 7 + held / 11
        assert cost.seconds == pytest.approx(seconds)
    assert placement.best.cost.seconds == min(c.cost.seconds for c in placement.candidates)


@settings(max_examples=60, deadline=None)
@given(bypasses, sites, st.sampled_from([2, 4]))
def test_enumeration_is_complete(bypass, site, devices):
    """Brute force over all states before and after each part, kept if the part allows them."""
    parts = network(bypass, site)
    found = {
        (c.reads, c.writes, *((s.before, s.after) for s in c.steps if isinstance(s, Compute)))
        for c in plan_placement(bypass, site, devices, 8).candidates
    }
    assert len(found) == len(plan_placement(bypass, site, devices, 8).candidates)
    ends = {(key[0], key[1]) for key in found}
    expected = set()
    for pairs in itertools.product(itertools.product(State, State), repeat=len(parts)):
        if all(allowed(p, b, a, devices) for p, (b, a) in zip(parts, pairs, strict=True)):
            expected |= {(*end, *pairs) for end in ends}
    assert found == expected


def allowed(part, before: State, after: State, devices: int) -> bool:
    """Whether some weight lets each device compute its share of ``after`` from ``before`` alone."""
    for state, features in ((before, part.inputs), (after, part.outputs)):
        if state is State.FEATURES and features % devices:
            return False
    if part.kind == "linear":
        contracted = (before, after) == (State.FEATURES, State.PARTIAL)
        produced = (before, after) == (State.REPLICATED, State.FEATURES)
        return contracted or produced or (before is after and before is not State.FEATURES)
    return before is after and (part.kind == "scale" or before is not State.PARTIAL)


# The rules of the paper


@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("tokens", [1, 64, 512, 4096])
@pytest.mark.parametrize("rank", [8, 16, 64])
@pytest.mark.parametrize("module", ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"])
def test_column_parallel_base(module, rank, tokens, devices):
    best = plan_placement(Lora(rank), Site.of(LLAMA_8B, module), devices, tokens).best
    assert best.weights == {"A": "whole", "B": "outputs"}
    assert best.writes is State.FEATURES
    assert best.cost.moved == 0


@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("tokens", [1, 64, 512, 4096])
@pytest.mark.parametrize("rank", [8, 16, 64])
@pytest.mark.parametrize("module", ["o_proj", "down_proj"])
def test_row_parallel_base(module, rank, tokens, devices):
    best = plan_placement(Lora(rank), Site.of(LLAMA_8B, module), devices, tokens).best
    assert best.weights == {"A": "inputs", "B": "whole"}
    assert best.writes is State.PARTIAL  # merged by the all-reduce that the base makes anyway
    assert best.cost.moved == 0


@pytest.mark.parametrize("plan", ["column", "row"])
def test_backward_of_the_rules_sends_nothing_but_one_sum_per_update(plan):
    """Gradients stay in states that the base has anyway; a whole weight's are summands."""
    devices, tokens, site = 4, 6, Site(8, 12, plan)
    random = np.random.default_rng(3)
    x, dy = random.normal(size=(tokens, 8)), random.normal(size=(tokens, 12))
    a, b = random.normal(size=(4, 8)), random.normal(size=(12, 4))
    best = plan_placement(Lora(4), site, devices, tokens).best
    before, _ = base_states(plan, devices)
    inputs = lay_out(x, before, devices)
    # The base's backward: slices of dy for a column-parallel module, all of dy for a row-parallel.
    dys = lay_out(dy, State.FEATURES if plan == "column" else State.REPLICATED, devices)
    own_a = np.split(a, devices, axis=1) if best.weights["A"] == "inputs" else [a] * devices
    own_b = np.split(b, devices, axis=0) if best.weights["B"] == "outputs" else [b] * devices

    dh = [g @ w for g, w in zip(dys, own_b, strict=True)]
    da = [g.T @ own for g, own in zip(dh, inputs, strict=True)]
    db = [g.T @ (own @ w.T) for g, own, w in zip(dys, inputs, own_a, strict=True)]
    dx = [g @ w for g, w in zip(dh, own_a, strict=True)]

    if plan == "column":
        da_whole, db_whole = np.sum(da, axis=0), np.concatenate(db, axis=0)
        dx_whole = np.sum(dx, axis=0)  # a partial sum, like the base's own dx
    else:
        da_whole, db_whole = np.concatenate(da, axis=1), np.sum(db, axis=0)
        dx_whole = np.concatenate(dx, axis=1)
    np.testing.assert_allclose(da_whole, (dy @ b).T @ x)
    np.testing.assert_allclose(db_whole, dy.T @ (x @ a.T))
    np.testing.assert_allclose(dx_whole, dy @ b @ a)


@pytest.mark.parametrize("plan", ["replicated", "data"])
def test_other_base_plans_move_nothing(plan):
    best = plan_placement(Lora(16), Site(4096, 4096, plan), 4, 64).best
    assert best.weights == {"A": "whole", "B": "whole"}
    assert best.cost.moved == 0


@pytest.mark.parametrize(
    ("module", "on", "part"),
    [("k_proj", "output", "features"), ("down_proj", "input", "features")],
)
def test_ia3_lies_like_what_it_scales(module, on, part):
    best = plan_placement(IA3(on), Site.of(LLAMA_8B, module), 4, 64).best
    assert best.weights == {"scale": part}
    assert best.cost.moved == 0


def test_series_adapter_after_a_row_parallel_module_reads_the_finished_sum():
    site = Site.of(LLAMA_8B, "down_proj")
    placement = plan_placement(Bottleneck(64, "relu"), site, 4, 64)
    assert placement.best.reads is placement.best.writes is State.REPLICATED
    assert placement.best.cost.moved == 0
    assert {(c.reads, c.writes) for c in placement.candidates} == {
        (State.PARTIAL, State.PARTIAL),
        (State.REPLICATED, State.REPLICATED),
    }
    for candidate in placement.candidates:  # a nonlinearity never sees a mere summand
        act = next(s for s in candidate.steps if isinstance(s, Compute) and s.part.name == "relu")
        assert act.before is not State.PARTIAL


def test_choice_follows_the_hardware():
    """A free network and slow arithmetic make it worth splitting what is replicated otherwise."""
    site = Site.of(LLAMA_8B, "q_proj")
    slow = Hardware(flops=1e9, bandwidth=1e15, latency=0.0, memory_bandwidth=1e15)
    best = plan_placement(Lora(16), site, 4, 512, hardware=slow).best
    assert best.weights["A"] != "whole" or State.TOKENS in {s.after for s in best.steps}
    assert best.cost.moved > 0


# The trivial case, and bad input


@settings(max_examples=40, deadline=None)
@given(bypasses, sites, st.integers(1, 9))
def test_one_device_has_the_trivial_plan_alone(bypass, site, tokens):
    (only,) = plan_placement(bypass, site, 1, tokens).candidates
    assert set(only.weights.values()) == {"whole"}
    assert only.reads is only.writes is State.REPLICATED
    assert all(isinstance(step, Compute) for step in only.steps)
    assert only.cost.moved == only.cost.collectives == 0


def test_indivisible_rank_stays_whole():
    candidates = plan_placement(Lora(5), Site(8, 8, "column"), 4, 16).candidates
    for step in itertools.chain.from_iterable(c.steps for c in candidates):
        features = step.features if isinstance(step, Convert) else step.part.outputs
        assert features != 5 or step.after is not State.FEATURES


@pytest.mark.parametrize("kind", ["all-gather", "all-reduce", "reduce-scatter", "all-to-all"])
def test_one_device_sends_nothing(kind):
    assert sent(kind, 1e6, 1) == 0


def test_describe_shows_costs_and_steps():
    placement = plan_placement(Lora(16), Site.of(LLAMA_8B, "down_proj"), 4, 64)
    lines = placement.describe().splitlines()
    assert len(lines) == 2 + len(placement.candidates)
    assert lines[0] == "row 14336 -> 4096 on 4 devices"
    assert lines[2].endswith(
        "partitioned(features) -> A[inputs] -> partial sum -> B[whole] -> partial sum"
    )
    assert any("(all-reduce)" in line for line in lines)


@pytest.mark.parametrize(
    ("site", "devices", "tokens", "message"),
    [
        (Site(8, 6, "column"), 4, 1, "splits 6 features, which 4 devices"),
        (Site(6, 8, "row"), 4, 1, "splits 6 features, which 4 devices"),
        (Site(8, 8, "column"), 0, 1, "at least 1, not 0"),
        (Site(8, 8, "column"), 2, 0, "at least 1, not 2, 0"),
        (Site(8, 8, "pipeline"), 2, 1, "column, row, replicated, data, not 'pipeline'"),
    ],
)
def test_impossible_placements_are_refused(site, devices, tokens, message):
    with pytest.raises(ConfigurationError, match=message):
        plan_placement(Lora(2), site, devices, tokens)


def test_a_bias_has_nothing_to_place():
    with pytest.raises(ConfigurationError, match="nothing to place"):
        plan_placement(TrainedBias(), Site(8, 8, "column"), 2, 4)
