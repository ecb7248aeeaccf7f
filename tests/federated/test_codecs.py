"""Every codec keeps shapes, loses no more than it says, and reads hostile bytes safely."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch import registry
from anabranch.errors import ConfigurationError
from anabranch.federated.codecs import (
    Cast,
    Chain,
    Codec,
    ErrorFeedback,
    Identity,
    Projection,
    Quantise,
    RandK,
    Sign,
    TopK,
    bits,
)
from anabranch.federated.errors import PayloadError
from anabranch.federated.payload import decode, encode

CODECS = {
    "identity": Identity(),
    "float16": Cast("f16"),
    "bfloat16": Cast("bf16"),
    "2 bits": Quantise(2),
    "5 bits": Quantise(5),
    "8 bits": Quantise(8),
    "8 bits nearest": Quantise(8, stochastic=False),
    "4 bits l2": Quantise(4, norm="l2"),
    "top": TopK(0.2),
    "top each": TopK(0.2, per_tensor=True),
    "random": RandK(0.2),
    "random each": RandK(0.2, per_tensor=True),
    "projection": Projection(8),
    "projection then 8 bits": Chain([Projection(8), Quantise(8)]),
    "sign": Sign(),
    "top then 8 bits": Chain([TopK(0.3), Quantise(8)]),
    "top then 16 bits": Chain([TopK(0.3), Cast()]),
    "feedback": ErrorFeedback(TopK(0.1)),
    "feedback of a chain": ErrorFeedback(Chain([TopK(0.2), Quantise(4)])),
}
every_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)


def sent(codec: Codec, payload, state=None, seed=0):
    """What the receiver sees, through real bytes."""
    coded = codec.encode(payload, {} if state is None else state, np.random.default_rng(seed))
    return codec.decode(decode(encode(coded)))


def payload(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(7, 5, generator=generator),
        "b": torch.randn(3, generator=generator).to(torch.bfloat16),
        "scalar": torch.randn((), generator=generator),
        "none": torch.empty(0, 4),
        "double": torch.randn(4, dtype=torch.float64, generator=generator),
        "index": torch.arange(4),
        "note": "text",
        "count": 3,
    }


@every_codec
def test_shapes_types_and_other_values_are_kept(codec):
    original = payload()
    back = sent(codec, original)
    assert back.keys() == original.keys()
    for name, value in original.items():
        if isinstance(value, torch.Tensor):
            assert back[name].shape == value.shape and back[name].dtype == value.dtype, name
            assert value.is_floating_point() or torch.equal(back[name], value)
        else:
            assert back[name] == value
    assert codec.decode(codec.encode({}, {}, np.random.default_rng(0))) == {}


@every_codec
def test_the_same_seed_gives_the_same_bytes_and_inputs_are_left_alone(codec):
    original = payload()
    before = encode(original)
    first, second = (encode(codec.encode(original, {}, np.random.default_rng(5))) for _ in range(2))
    assert first == second
    assert encode(original) == before


@every_codec
def test_zero_is_zero(codec):
    back = sent(codec, {"x": torch.zeros(9)})["x"]
    assert torch.equal(back, torch.zeros(9))


@every_codec
def test_damaged_codes_are_named(codec):
    """Or they are other codes: then what comes out is a payload of the same values' names."""
    original = payload()
    coded = codec.encode(original, {}, np.random.default_rng(0))
    rng = np.random.default_rng(1)
    others = (None, 7, "f32 9999999999 9999999999", "x", torch.ones(3), torch.full((1,), -1))
    for name, value in coded.items():
        rest = {k: v for k, v in coded.items() if k != name}
        damages = [rest if other is None else {**rest, name: other} for other in others]
        if isinstance(value, torch.Tensor) and value.dtype == torch.uint8 and len(value):
            noise = torch.from_numpy(rng.integers(0, 256, len(value), dtype=np.uint8))
            damages.append({**coded, name: noise})
        for damaged in damages:
            try:
                found = codec.decode(damaged)
            except PayloadError as error:
                assert str(error)
            else:
                assert set(found) <= set(original)
                assert decode(encode(found)).keys() == found.keys()


@pytest.mark.parametrize("codec", [Quantise(4), Sign(), TopK(0.5), Projection()], ids=repr)
def test_nan_has_no_code(codec):
    with pytest.raises(PayloadError):
        sent(codec, {"x": torch.tensor([1.0, math.nan])})


@pytest.mark.parametrize(
    "codec",
    [
        Quantise(2),
        Quantise(5),
        Quantise(4, norm="l2"),
        RandK(0.25),
        Projection(2),
        Projection(10),
        Chain([Projection(20), Quantise(6)]),
        Chain([RandK(0.5), Quantise(3)]),
    ],
    ids=repr,
)
def test_unbiased_codecs_are_right_on_average(codec):
    assert codec.unbiased
    x = torch.randn(40, generator=torch.Generator().manual_seed(1))
    draws = torch.stack([sent(codec, {"x": x}, seed=seed)["x"] for seed in range(600)]).double()
    error = draws.mean(0) - x
    deviation = draws.std(0) / math.sqrt(len(draws))
    assert (error.abs() <= 5 * deviation + 1e-6).all()
    if not isinstance(codec, Chain):
        variance = float((draws - x).square().sum(1).mean())
        assert variance <= 1.1 * codec.omega(40) * float(x.square().sum())


@pytest.mark.parametrize("k", [2, 4, 40])
def test_no_change_is_projected_worse_than_its_bound(k):
    """Blocks of any norms, also where all the change is in one of them."""
    codec = Projection(k)
    for seed, norms in enumerate(
        ([1, 1, 1], [1, 0, 0], [0, 0, 1], [9, 4, 1], [1, 2.1 / k, 2.9 / k])
    ):
        generator = torch.Generator().manual_seed(seed)
        x = {str(i): norm * torch.randn(30, generator=generator) for i, norm in enumerate(norms)}
        found = [sent(codec, x, seed=seed) for seed in range(200)]
        error = sum(float((f[n] - x[n]).square().sum()) for f in found for n in x) / len(found)
        assert error <= 1.1 * codec.omega(90) * sum(float(t.square().sum()) for t in x.values())


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40))
def test_rounding_to_nearest_is_off_by_half_a_level_at_most(values):
    x = torch.tensor(values)
    codec = Quantise(6, stochastic=False)
    step = float(x.abs().max()) / codec.levels
    assert float((sent(codec, {"x": x})["x"] - x).abs().max()) <= step / 2 * (1 + 1e-5) + 1e-30


@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=60))
def test_biased_codecs_contract_as_they_say(values):
    x = torch.tensor(values, dtype=torch.float64)
    for codec in (TopK(0.1), TopK(0.5), Sign()):
        missing = (sent(codec, {"x": x})["x"] - x).square().sum()
        allowed = (1 - codec.contraction(len(x))) * x.square().sum()
        assert missing <= allowed * (1 + 1e-6) + 1e-9


def test_top_k_is_the_largest_over_all_tensors_and_the_first_of_equals():
    original = {"a": torch.tensor([1.0, -9.0, 2.0]), "b": torch.tensor([[3.0], [9.0], [9.0]])}
    back = sent(TopK(2 / 6), original)
    assert back["a"].tolist() == [0, -9, 0]
    assert back["b"].tolist() == [[0], [9], [0]]
    each = sent(TopK(1 / 3, per_tensor=True), original)
    assert each["a"].tolist() == [0, -9, 0] and each["b"].tolist() == [[0], [9], [0]]


def test_exact_sizes():
    """k values of 4 bytes, k places of ceil(log2 d) bits; b bits a value and one float."""
    x = {"x": torch.randn(1000)}
    rng = np.random.default_rng(0)
    top = TopK(0.1).encode(x, {}, rng)
    assert top["all~top"].nbytes == 400 and top["all~top.at"].nbytes == math.ceil(100 * 10 / 8)
    rand = RandK(0.1).encode(x, {}, rng)
    assert rand["all~rand"].nbytes == 400 and type(rand["all~rand.seed"]) is int
    quantised = Quantise(3).encode(x, {}, rng)
    assert quantised["x~q"].nbytes == 375 and quantised["x~q.norm"].nbytes == 4
    assert Sign().encode(x, {}, rng)["x~sign"].nbytes == 125
    blocks = {"x": torch.ones(1000), "y": torch.ones(1000) / 4}
    products = Projection(16).encode(blocks, {}, rng)
    assert products["all~dot.count"].tolist() == [16, 4] and products["all~dot"].nbytes == 80
    both = Chain([TopK(0.1), Quantise(8)]).encode(x, {}, rng)
    assert both["all~top~q"].nbytes == 100


@pytest.mark.parametrize(
    "inner", [TopK(0.05), Sign(), Quantise(2), Chain([TopK(0.3), Quantise(4)])]
)
def test_error_feedback_owes_what_it_did_not_send(inner):
    """Sum of decoded messages + residual = sum of inputs, at every moment."""
    codec, state = ErrorFeedback(inner), {}
    total = {"a": torch.zeros(8, 3, dtype=torch.float64), "b": torch.zeros(5, dtype=torch.float64)}
    received = {name: torch.zeros_like(x) for name, x in total.items()}
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        x = {
            n: torch.randn(t.shape, dtype=torch.float64, generator=generator)
            for n, t in total.items()
        }
        back = sent(codec, x, state, seed)
        for name in total:
            total[name] += x[name]
            received[name] += back[name]
            owed = total[name] - received[name]
            assert torch.allclose(owed, state["residual"][name], atol=1e-9)
    # Nothing is owed for long: everything that goes in comes out.
    for seed in range(400):
        back = sent(codec, {n: torch.zeros_like(x) for n, x in total.items()}, state, seed)
        for name in total:
            received[name] += back[name]
    if isinstance(inner, TopK):
        assert all(torch.allclose(total[n], received[n], atol=1e-6) for n in total)


@given(st.integers(1, 16), st.data())
def test_packed_bits_come_back(width, data):
    numbers = data.draw(st.lists(st.integers(0, 2**width - 1), max_size=50))
    packed = bits.pack(np.array(numbers, dtype=np.int64), width)
    assert len(packed) == math.ceil(width * len(numbers) / 8) == bits.size(len(numbers), width)
    assert bits.unpack(packed, width, len(numbers), "x").tolist() == numbers


def test_packing_in_chunks(monkeypatch):
    numbers = np.arange(1000) % 2**11
    whole = bits.pack(numbers, 11)
    monkeypatch.setattr(bits, "_CHUNK", 64)
    assert torch.equal(bits.pack(numbers, 11), whole)
    assert (bits.unpack(whole, 11, 1000, "x") == numbers).all()


def test_options_that_cannot_work():
    for make in (
        lambda: Quantise(1),
        lambda: TopK(0),
        lambda: RandK(1.5),
        lambda: Projection(1),
        lambda: Projection(2**16),
        lambda: Cast("f8"),
        lambda: Chain([]),
        lambda: ErrorFeedback(ErrorFeedback(Sign())),
    ):
        with pytest.raises(ConfigurationError):
            make()


def test_codecs_are_found_by_name():
    assert {
        "identity",
        "cast",
        "quantise",
        "top_k",
        "rand_k",
        "projection",
        "sign",
        "error_feedback",
    } <= set(registry.available("codecs"))
