"""Shares, numbers and masks by themselves."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import ConfigurationError
from anabranch.federated.errors import PayloadError
from anabranch.federated.secure import FixedPoint, OutOfRange, SecureOptions, masks, shamir
from anabranch.federated.secure.fixed_point import flatten, unflatten
from anabranch.federated.secure.protocol import pair_mask


@settings(max_examples=40, deadline=None)
@given(st.data(), st.binary(min_size=32, max_size=32), st.integers(1, 9))
def test_any_threshold_of_shares_give_the_secret(data, secret, threshold):
    count = data.draw(st.integers(threshold, 9))
    shares = shamir.split(secret, threshold, count)
    assert {len(share) for share in shares} == {shamir.SHARE_BYTES}
    places = data.draw(st.permutations(range(1, count + 1)))
    enough = places[: data.draw(st.integers(threshold, count))]
    assert shamir.recover({place: shares[place - 1] for place in enough}) == secret
    if threshold > 1:
        few = {place: shares[place - 1] for place in places[: threshold - 1]}
        assert shamir.recover(few) != secret


def test_fewer_shares_fit_every_secret():
    """For any other secret there is a last share that gives it: fewer shares tell nothing."""
    shares = shamir.split(bytes(32), 3, 3)
    known = {1: int.from_bytes(shares[0], "big"), 2: int.from_bytes(shares[1], "big")}
    for wanted in (1, 2**255 - 19, 2**256 - 1):
        # The parabola through (0, wanted), (1, .), (2, .) at 3, by the third difference.
        last = (wanted - 3 * known[1] + 3 * known[2]) % shamir.PRIME
        forged = {1: shares[0], 2: shares[1], 3: last.to_bytes(shamir.SHARE_BYTES, "big")}
        assert shamir.recover(forged) == wanted.to_bytes(32, "big")


def test_shares_that_cannot_be():
    for arguments in ((bytes(31), 1, 2), (bytes(32), 3, 2), (bytes(32), 0, 2)):
        with pytest.raises(ValueError, match="shares"):
            shamir.split(*arguments)
    assert shamir.recover({1: b"\x01" + bytes(65)}) is None


FORMATS = st.sampled_from([FixedPoint(), FixedPoint(64, 40), FixedPoint(32, 8), FixedPoint(32, 16)])


@settings(max_examples=60, deadline=None)
@given(FORMATS, st.data(), st.integers(1, 6))
def test_sums_are_those_of_rounded_values(numbers, data, sites):
    weights = data.draw(st.lists(st.integers(0, 50), min_size=sites, max_size=sites))
    limit = 2.0 ** (numbers.bits - 1 - numbers.fraction) / sites / 50
    values = data.draw(
        st.lists(
            st.lists(st.floats(-limit / 2, limit / 2), min_size=3, max_size=3),
            min_size=sites,
            max_size=sites,
        )
    )
    total = np.zeros(3, numbers.dtype)
    for vector, weight in zip(values, weights, strict=True):
        total += numbers.encode(np.array(vector), weight, sites)
    exact = [
        sum(w * round(v[i] * 2**numbers.fraction) for v, w in zip(values, weights, strict=True))
        for i in range(3)
    ]
    signed = numbers.to_tensor(total).tolist()
    assert signed == exact
    assert numbers.decode(total).tolist() == [n / 2**numbers.fraction for n in exact]
    assert np.array_equal(numbers.from_tensor(numbers.to_tensor(total)), total)


@pytest.mark.parametrize("numbers", [FixedPoint(), FixedPoint(32, 16)])
def test_the_largest_sums_do_not_wrap_around(numbers):
    sites, weight = 7, 3
    limit = 2.0 ** (numbers.bits - 1 - numbers.fraction) / sites / weight
    for sign in (1, -1):
        total = sum(
            (numbers.encode(np.array([sign * limit * 0.999]), weight, sites) for _ in range(sites)),
            np.zeros(1, numbers.dtype),
        )
        found = float(numbers.decode(total)[0])
        assert found == pytest.approx(sign * limit * 0.999 * weight * sites, rel=1e-4)
    for value in (limit * 1.01, -limit * 1.01, np.inf, np.nan):
        with pytest.raises(OutOfRange, match="the limit is"):
            numbers.encode(np.array([0.0, value]), weight, sites)
    with pytest.raises(OutOfRange, match="too large"):
        numbers.whole(2 ** (numbers.bits - 1), 1, "the weight")


def test_tensors_become_one_vector_and_again():
    like = {"b": torch.rand(2, 3), "a": torch.rand(()).bfloat16(), "c": torch.empty(0)}
    again = unflatten(flatten(like), like)
    assert all(torch.equal(again[n], t) and again[n].dtype == t.dtype for n, t in like.items())


@pytest.mark.parametrize(
    "options",
    [{"bits": 16}, {"bits": 32, "fraction": 31}, {"fraction": 0}],
)
def test_numbers_that_cannot_be(options):
    with pytest.raises(ConfigurationError):
        FixedPoint(**options)


@pytest.mark.parametrize("threshold", [0, 1, 0.5, 1.5, True, -1])
def test_thresholds_that_cannot_be(threshold):
    with pytest.raises(ConfigurationError, match="threshold is a number of sites"):
        SecureOptions(threshold)


def test_thresholds():
    assert [SecureOptions().needed(n) for n in (1, 2, 3, 4, 6, 9)] == [2, 2, 2, 3, 4, 6]
    assert [SecureOptions(1.0).needed(n) for n in (2, 5)] == [2, 5]
    assert [SecureOptions(3).needed(n) for n in (2, 4, 5, 8)] == [3, 3, 3, 5]


@pytest.mark.parametrize("dtype", [np.dtype(np.uint32), np.dtype(np.uint64)])
def test_masks_of_a_pair_cancel(dtype):
    (a, of_a), (b, of_b), (_, of_c) = (masks.new_pair() for _ in range(3))
    one = pair_mask("a", "b", a, of_b, 100, dtype)
    other = pair_mask("b", "a", b, of_a, 100, dtype)
    assert not (one + other).any() and one.any()
    assert (one != pair_mask("a", "c", a, of_c, 100, dtype)).any()
    assert masks.agree(a, of_b, "mask") != masks.agree(a, of_b, "seal")


def test_sealed_letters():
    key = os.urandom(32)
    sealed = masks.seal(key, b"content", b"a to b")
    assert masks.unseal(key, sealed, b"a to b") == b"content" and b"content" not in sealed
    assert masks.seal(key, b"content", b"a to b") != sealed
    for bad in (sealed[:-1], bytes([sealed[0] ^ 1]) + sealed[1:], b""):
        with pytest.raises(PayloadError, match="changed on the way"):
            masks.unseal(key, bad, b"a to b")
    with pytest.raises(PayloadError, match="changed on the way"):
        masks.unseal(key, sealed, b"b to a")


def test_keys_that_are_none():
    private, _ = masks.new_pair()
    for bad in (bytes(32), b"short"):
        with pytest.raises(PayloadError, match="no public key"):
            masks.agree(private, bad, "mask")
