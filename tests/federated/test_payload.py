"""Bytes of payloads: exact, compact, and safe to read from anybody."""

from __future__ import annotations

import contextlib
import json
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import ConfigurationError
from anabranch.federated import trees
from anabranch.federated.errors import PayloadError
from anabranch.federated.messages import Reply, Task, Work
from anabranch.federated.payload import DTYPES, decode, encode
from anabranch.federated.wire import Field, Schema, Wire


@st.composite
def tensors(draw):
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    size = torch.Size(shape).numel() * dtype.itemsize
    raw = draw(st.binary(min_size=size, max_size=size))
    if dtype == torch.bool:
        raw = bytes(byte & 1 for byte in raw)
    if not size:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape)


values = st.one_of(
    tensors(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.text(st.characters(exclude_categories=["Cs"])),
    st.binary(),
)
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
payloads = st.dictionaries(names, values, max_size=5)


def same(one, other):
    if isinstance(one, torch.Tensor):
        return (
            isinstance(other, torch.Tensor)
            and one.dtype == other.dtype
            and one.shape == other.shape
            and bits(one) == bits(other)
        )
    if isinstance(one, float):
        return isinstance(other, float) and struct.pack("<d", one) == struct.pack("<d", other)
    return type(one) is type(other) and one == other


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


@given(payloads)
def test_decoding_undoes_encoding_bit_for_bit(payload):
    data = encode(payload)
    back = decode(data)
    assert list(back) == sorted(payload)
    assert all(same(payload[name], back[name]) for name in payload)
    assert encode(back) == data
    assert encode(dict(reversed(payload.items()))) == data


def test_views_and_gradients_are_sent_by_value():
    base = torch.arange(12.0).reshape(3, 4)
    payload = {"t": base.T, "s": base[:, ::2], "g": torch.ones(2, requires_grad=True)}
    back = decode(encode(payload))
    assert torch.equal(back["t"], base.T) and torch.equal(back["s"], base[:, ::2])
    assert not back["g"].requires_grad
    back["g"].add_(1)  # its own memory, writable


def test_bfloat16_costs_two_bytes_a_value():
    value = torch.randn(1000).bfloat16()
    assert len(encode({"x": value})) < 2000 + 40
    assert torch.equal(decode(encode({"x": value}))["x"], value)


@given(payloads)
def test_every_truncated_message_is_named_as_such(payload):
    data = encode(payload)
    for end in {0, 1, 3, 4, len(data) // 2, len(data) - 1} - {len(data)}:
        with pytest.raises(PayloadError):
            decode(data[:end])
    with pytest.raises(PayloadError):
        decode(data + b"\0")


@given(payloads, st.data())
def test_changed_bytes_give_a_payload_or_a_named_error(payload, data):
    damaged = bytearray(encode(payload))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = decode(bytes(damaged))
    except PayloadError as error:
        assert str(error)
    else:
        assert encode(found) == bytes(damaged), "two messages mean the same"


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data):
    with contextlib.suppress(PayloadError):
        assert encode(decode(data)) == data


def raw(header, values=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<I", len(text)) + text + values


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (struct.pack("<I", 2**32 - 1) + b"[]", "claims 4294967295 bytes"),
        (raw([["x", "f32", [2**30, 2**30]]]), "are left of 44"),
        (raw([["x", "f32", [0] + [2**31 - 1] * 31]]), "impossible shape"),
        (raw([["x", "f32", [10**30]]]), "has the size"),
        (raw([["x", "f32", [-1]]]), "has the size -1"),
        (raw([["x", "f32", [True]]]), "has the size True"),
        (raw([["x", "f32", [0] * 40]]), "for a shape"),
        (raw([["x", "f31", [1]]], b"aaaa"), "unknown type 'f31'"),
        (raw([["x", "int", None], ["a", "int", None]], bytes(16)), "lists 'a' after 'x'"),
        (raw([["x", "int", None], ["x", "int", None]], bytes(16)), "lists 'x' after 'x'"),
        (raw([["x", "int", 3]], bytes(8)), "has no size"),
        (raw([["x", "str", 2]], b"\xff\xff"), "UTF-8"),
        (raw([["x", "bool", None]], b"\7"), "neither true nor false"),
        (raw([["x", "b8", [2]]], b"\7\1"), "neither true nor false"),
        (raw([["x"]]), "no .name, type, size."),
        (raw({"x": 1}), "no list"),
        (raw(b"[" * 100_000), "no JSON"),
        (raw(b"\xff\xfe"), "no JSON"),
        (b"", "too few"),
    ],
)
def test_hostile_headers(data, says):
    with pytest.raises(PayloadError, match=says):
        decode(data)


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        ({"x": None}, "'x' is a NoneType"),
        ({"x": [1]}, "'x' is a list"),
        ({1: 1}, "name 1 is a int"),
        ({"x": 2**63}, "64 bits"),
        ({"x": torch.zeros(1, dtype=torch.complex64)}, "complex64"),
        ({"x": "\ud800"}, "no text"),
    ],
)
def test_values_that_have_no_bytes(payload, says):
    with pytest.raises(PayloadError, match=says):
        encode(payload)


def test_one_byte_messages_cost_one_byte():
    schema = Schema((Field("g", "i8", (-1,)),))
    for count in (0, 1, 30):
        payload = {"g": torch.arange(count, dtype=torch.int8)}
        data = schema.encode(payload)
        assert len(data) == count
        assert torch.equal(schema.decode(data)["g"], payload["g"])


def test_a_pool_of_scalars_costs_four_bytes_a_seed():
    schema = Schema(
        (Field("lr", "float"), Field("pool", "f32", (-1,)), Field("eps", "f32", (2, 3)))
    )
    payload = {"lr": 0.1, "pool": torch.randn(64), "eps": torch.randn(2, 3)}
    data = schema.encode(payload)
    assert len(data) == 8 + 64 * 4 + 24
    back = schema.decode(data)
    assert all(same(payload[name], back[name]) for name in payload)


@given(st.binary(max_size=64))
def test_a_schema_reads_any_bytes_or_says_why_not(data):
    schema = Schema((Field("n", "int"), Field("rows", "f32", (-1, 3)), Field("flag", "bool")))
    try:
        assert schema.encode(schema.decode(data)) == data
    except PayloadError:
        assert len(data) < 9 or (len(data) - 9) % 12 or data[-1] > 1


def test_payloads_that_are_not_the_schemas():
    schema = Schema((Field("x", "f32", (-1, 2)),))
    with pytest.raises(PayloadError, match=r"\['y'\], the schema \['x'\]"):
        schema.encode({"y": 1})
    with pytest.raises(PayloadError, match="the schema says"):
        schema.encode({"x": torch.zeros(2, 3)})
    with pytest.raises(PayloadError, match="rows of 8 bytes"):
        schema.decode(b"abc")


@pytest.mark.parametrize(
    "fields",
    [
        (Field("a", "str"), Field("b", "bytes")),
        (Field("a", "f32"),),
        (Field("a", "int", (1,)),),
        (Field("a", "f32", (2, -1)),),
        (Field("a", "f99", (1,)),),
        (Field("a", "int"), Field("a", "int")),
    ],
)
def test_schemas_that_cannot_work(fields):
    with pytest.raises(ConfigurationError):
        Schema(fields)


def test_a_wire_uses_the_schema_of_the_kind_and_says_what_was_agreed():
    schema = Schema((Field("g", "i8", (-1,)),))
    wire = Wire({("up", "probe"): schema})
    payload = {"g": torch.ones(2, dtype=torch.int8)}
    assert len(wire.encode("up", "probe", payload)) == 2
    assert wire.encode("down", "probe", payload) == encode(payload)
    assert wire.fingerprint != Wire().fingerprint
    assert wire.fingerprint == Wire({("up", "probe"): schema}).fingerprint


leaves = st.one_of(tensors(), st.binary(max_size=9), st.none(), st.integers(), st.text("abc~$"))
keys = st.text("abc/~", max_size=3)
nested = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)


@given(nested)
def test_trees_come_back(tree):
    back = trees.load(trees.dump(tree))

    def equal(one, other):
        if isinstance(one, dict):
            return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
        if isinstance(one, list):
            return len(one) == len(other) and all(map(equal, one, other))
        return same(one, other)

    assert equal(tree, back)


def test_a_tree_stores_the_same_bytes_once_and_names_what_it_cannot_store():
    body = bytes(10_000)
    assert len(trees.dump([body] * 50)) < 12_000
    with pytest.raises(PayloadError, match="state /a/1: a set"):
        trees.dump({"a": [1, {2}]})
    with pytest.raises(PayloadError, match="cannot be a key"):
        trees.dump({"a": {3: 1}})


def test_messages_come_back_and_damaged_ones_are_named():
    task = Task(3, "ü/x", "train", 2, 1.5, Work(steps=4), 9.0, 3, 0, 1, 2, 2, b"body")
    reply = Reply(3, "ü/x", "train", 2, 10, 4.0, {"loss": 0.5}, "", b"body")
    assert Task.from_bytes(task.to_bytes()) == task
    assert Reply.from_bytes(reply.to_bytes()) == reply
    assert len(task.to_bytes()) == 4 + len(task.envelope()) + 4
    for data in (task.to_bytes(), reply.to_bytes()):
        for end in (0, 3, 10):
            with pytest.raises(PayloadError):
                Reply.from_bytes(data[:end])
    for change in (
        b'"examples":"10"',
        b'"examples":true',
        b'"metrics":{"loss":"a"}',
        b'"extra":1',
        b'"units":NaN',
    ):
        envelope = b'{"task":1,"client":"a","kind":"k","version":0,' + change + b"}"
        with pytest.raises(PayloadError):
            Reply.from_bytes(struct.pack("<I", len(envelope)) + envelope)
    with pytest.raises(PayloadError):
        Reply.from_bytes(struct.pack("<I", 2) + b"{}")
    with pytest.raises(PayloadError):
        Task.from_bytes(reply.to_bytes())
