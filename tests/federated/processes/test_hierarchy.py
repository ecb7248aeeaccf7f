"""Aggregators in processes: the flat weighted mean for any tree, and nothing lost or left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import ConfigurationError
from anabranch.federated.aggregation import Krum
from anabranch.federated.aggregation.tree import (
    Hierarchy,
    Layout,
    Link,
    SharedStore,
    TreePlan,
    require_mean,
)
from anabranch.federated.aggregation.tree.aggregator import CHUNK, Addend, Sum
from anabranch.federated.errors import (
    AggregationError,
    EmptyRound,
    FederationError,
    NotFinite,
    PayloadError,
    PayloadMismatch,
    ReplyRefused,
    StoreFull,
    TopologyError,
)
from anabranch.federated.payload import encode
from anabranch.federated.runtimes.processes.segments import PREFIX, shared_memory
from anabranch.federated.scheduling.placement import worst_fit
from anabranch.federated.server import Update
from anabranch.federated.strategies import FedAvg

LIKE = {"w": torch.zeros(40, 25), "b": torch.zeros(7), "scale": torch.zeros(())}


def updates(count, seed=0, like=LIKE):
    """Encoded updates by client, with as many examples as their number and one."""
    made = torch.Generator().manual_seed(seed)
    tensors = {
        f"c{i}": {n: torch.randn(t.shape, generator=made).to(t.dtype) for n, t in like.items()}
        for i in range(count)
    }
    return tensors, {name: i + 1 for i, name in enumerate(tensors)}


def flat_mean(tensors, examples):
    total = sum(examples[name] for name in tensors)
    names = next(iter(tensors.values()))
    return {
        n: sum(t[n].double() * examples[name] for name, t in tensors.items()) / total for n in names
    }


def assert_mean(total, tensors, examples, like=LIKE):
    expected = flat_mean(tensors, examples)
    mean = total.mean()
    assert total.weight == sum(examples[name] for name in tensors)
    assert total.updates == len(tensors)
    for name, tensor in like.items():
        assert mean[name].dtype == tensor.dtype and mean[name].shape == tensor.shape
        exact = expected[name].to(tensor.dtype)
        assert torch.allclose(mean[name].double(), exact.double(), rtol=1e-6, atol=1e-7), name


def run(hierarchy, tensors, examples, order=None, **options):
    round_ = hierarchy.begin(next(iter(tensors.values())), list(tensors), **options)
    for name in order or tensors:
        round_.submit(name, encode(tensors[name]), examples[name])
    return round_.result(timeout=30)


def empty(hierarchy):
    """No object is left, and no file but those that wait for the next one."""
    for node in hierarchy.nodes.values():
        files = [path.stat().st_size for path in node.store.segments.folder.glob("?" * 32)]
        if len(node.store) or node.store.held or sum(files) != node.store.spare:
            return False
    return True


@pytest.fixture(autouse=True)
def nothing_left():
    before = set(shared_memory().glob(f"{PREFIX}*"))
    yield
    mine = set(shared_memory().glob(f"{PREFIX}*")) - before
    assert mine <= {node.store.segments.folder for node in SHARED.values()}
    for node in SHARED.values():
        node.store.trim()
    for folder in mine:
        assert {path.name for path in folder.iterdir()} <= {"lock", "gateway"}


SHARED: dict[str, object] = {}
"""The nodes of the module's hierarchy, whose folders may stay from test to test."""


@pytest.fixture(scope="module")
def hierarchy():
    with Hierarchy({"a": 5, "b": 5, "c": 5}, fan_in=2, memory=10**7) as made:
        SHARED.update(made.nodes)
        yield made
        SHARED.clear()
        pids = [pid for node in made.nodes.values() for pid in node.agent.pids]
    assert not any(psutil.pid_exists(pid) for pid in pids)


@settings(max_examples=15, deadline=None)
@given(
    count=st.integers(1, 17),
    seed=st.integers(0, 10),
    leaves=st.lists(st.integers(1, 6), min_size=3, max_size=3),
    top=st.sampled_from("abc"),
    data=st.data(),
)
def test_any_tree_order_and_weights_give_the_flat_mean(hierarchy, count, seed, leaves, top, data):
    tensors, _ = updates(count, seed)
    weights = st.lists(st.integers(0, 1000), min_size=count, max_size=count).filter(any)
    examples = dict(zip(tensors, data.draw(weights), strict=True))
    order = data.draw(st.permutations(list(tensors)))
    plan = TreePlan(dict(zip("abc", leaves, strict=True)), top)
    total = run(hierarchy, tensors, examples, order, plan=plan)
    assert_mean(total, tensors, examples)
    assert not total.refused and empty(hierarchy)


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float64,),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float64, torch.float16),
    ],
)
def test_types_are_what_they_were(hierarchy, dtypes):
    like = {str(n): torch.zeros(CHUNK + 3, dtype=dtype) for n, dtype in enumerate(dtypes)}
    tensors, examples = updates(5, like=like)
    assert_mean(run(hierarchy, tensors, examples), tensors, examples, like)


def test_sums_in_float32_are_half_as_large():
    tensors, examples = updates(6)
    with Hierarchy(fan_in=3, accumulate="f32") as hierarchy:
        total = run(hierarchy, tensors, examples)
        assert {t.dtype for t in total.sums.values()} == {torch.float32}
        for name, expected in flat_mean(tensors, examples).items():
            assert torch.allclose(total.mean()[name], expected.float(), rtol=1e-5, atol=1e-6)
        assert empty(hierarchy)


def test_a_server_commits_the_total_as_if_it_had_folded_the_updates(hierarchy):
    tensors, examples = updates(6)
    one, other = FedAvg(server_lr=0.5).server(LIKE), FedAvg(server_lr=0.5).server(LIKE)
    for server in (one, other):
        require_mean(server)
    acc = None
    for number, (name, payload) in enumerate(tensors.items()):
        update = Update(number, name, "train", 0, payload, examples[name], 0, 0.0, 0.0, {})
        acc = one.fold(acc, update)
    one.commit(acc)
    other.commit(run(hierarchy, tensors, examples).accumulator())
    for name in LIKE:
        assert torch.allclose(one.tensors[name], other.tensors[name], rtol=1e-6, atol=1e-8)


def test_each_key_is_passed_once_a_hop_and_is_all_that_is_passed():
    tensors, examples = updates(8)
    with Hierarchy(fan_in=2) as hierarchy:
        run(hierarchy, tensors, examples)
        counters = hierarchy.nodes["node-0"].agent.counters
        # 8 updates to 4 leaves, whose sums go to the middle.
        assert (counters.added, counters.key_bytes) == (12, 12 * 16)
        assert hierarchy.cross_bytes == 0


def test_sums_between_nodes_are_counted_and_worst_fit_sends_more():
    tensors, examples = updates(4)
    sent = {}
    for place in (None, worst_fit):
        options = {} if place is None else {"place": place}
        with Hierarchy({"a": 4, "b": 4, "c": 4}, **options) as hierarchy:
            assert_mean(run(hierarchy, tensors, examples), tensors, examples)
            sent[place] = hierarchy.cross_bytes
    elements = sum(t.numel() for t in LIKE.values())
    assert sent == {None: 0, worst_fit: 2 * 8 * elements}


def test_warm_aggregators_are_promoted_and_serve_the_next_round():
    tensors, examples = updates(8)
    with Hierarchy(fan_in=2) as hierarchy:
        agent = hierarchy.nodes["node-0"].agent
        run(hierarchy, tensors, examples)
        first = agent.counters.starts
        # 4 leaves and a middle, of which at most 4 at a time: someone was promoted.
        assert first <= 4 and agent.counters.promotions >= 1
        pids = set(agent.pids)
        run(hierarchy, tensors, examples)
        assert agent.counters.starts == first and set(agent.pids) == pids
        assert hierarchy.cpu_seconds > 0


def test_idle_aggregators_go_and_arrival_starts_new_ones():
    tensors, examples = updates(3)
    with Hierarchy(keep_alive=0.1) as hierarchy:
        agent = hierarchy.nodes["node-0"].agent
        assert agent.pids == []
        run(hierarchy, tensors, examples)
        cpu = wait_until(lambda: not agent.pids and hierarchy.cpu_seconds)
        assert_mean(run(hierarchy, tensors, examples), tensors, examples)
        assert hierarchy.cpu_seconds > cpu > 0.01, "the dead are counted"


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return found


def test_lazy_aggregators_begin_when_everything_is_there():
    tensors, examples = updates(4)
    with Hierarchy(fan_in=4, eager=False) as hierarchy:
        round_ = hierarchy.begin(LIKE, list(tensors))
        for name in list(tensors)[:3]:
            round_.submit(name, encode(tensors[name]), examples[name])
        time.sleep(0.05)
        assert hierarchy.nodes["node-0"].agent.counters.starts == 0
        round_.submit("c3", encode(tensors["c3"]), examples["c3"])
        assert_mean(round_.result(30), tensors, examples)


def test_eager_ones_begin_with_the_first():
    tensors, examples = updates(4)
    with Hierarchy(fan_in=4) as hierarchy:
        agent = hierarchy.nodes["node-0"].agent
        round_ = hierarchy.begin(LIKE, list(tensors))
        round_.submit("c0", encode(tensors["c0"]), examples["c0"])
        wait_until(lambda: agent.counters.added == 1)
        for name in ("c1", "c2", "c3"):
            round_.submit(name, encode(tensors[name]), examples[name])
        assert_mean(round_.result(30), tensors, examples)


@pytest.mark.parametrize("arrived", [1, 2, 3])
def test_a_killed_aggregator_is_replaced_and_nothing_counts_twice(arrived, caplog):
    tensors, examples = updates(4)
    with Hierarchy(fan_in=4) as hierarchy:
        agent = hierarchy.nodes["node-0"].agent
        round_ = hierarchy.begin(LIKE, list(tensors))
        for name in list(tensors)[:arrived]:
            round_.submit(name, encode(tensors[name]), examples[name])
        wait_until(lambda: agent.counters.added == arrived)
        [pid] = agent.pids
        os.kill(pid, signal.SIGKILL)
        for name in list(tensors)[arrived:]:
            round_.submit(name, encode(tensors[name]), examples[name])
        assert_mean(round_.result(30), tensors, examples)
        assert agent.counters.restarts == 1 and empty(hierarchy)
    assert "the aggregator of leaf 0 on node-0 died (exit code -9)" in caplog.text


def test_aggregators_that_die_again_and_again_end_the_round_and_not_the_next():
    tensors, examples = updates(2)
    with Hierarchy() as hierarchy:
        agent = hierarchy.nodes["node-0"].agent
        round_ = hierarchy.begin(LIKE, list(tensors))
        round_.submit("c0", encode(tensors["c0"]), 1)
        seen = set()
        for _ in range(4):
            [pid] = wait_until(lambda: set(agent.pids) - seen)
            seen.add(pid)
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(AggregationError, match=r"leaf 0 on node-0 died .* 4th time"):
            round_.result(30)
        with pytest.raises(ReplyRefused, match="no round is under way"):
            round_.submit("c1", encode(tensors["c1"]), 1)
        assert_mean(run(hierarchy, tensors, examples), tensors, examples)
        assert empty(hierarchy)


def test_a_full_store_makes_clients_wait_and_checkpoints_make_room():
    """Ten inputs of one leaf in a store with room for four."""
    tensors, examples = updates(10)
    body = encode(tensors["c0"])
    with Hierarchy(fan_in=10, memory=4 * len(body)) as hierarchy:
        assert_mean(run(hierarchy, tensors, examples), tensors, examples)
        agent, store = (getattr(hierarchy.nodes["node-0"], what) for what in ("agent", "store"))
        assert agent.counters.checkpoints >= 2 and agent.counters.added == 10
        assert store.peak <= 6 * len(body), "at most the sum so far was let in beyond"


def test_killed_after_a_checkpoint_the_sum_so_far_is_read_again():
    tensors, examples = updates(6)
    body = encode(tensors["c0"])
    with Hierarchy(fan_in=6, memory=4 * len(body)) as hierarchy:
        agent = hierarchy.nodes["node-0"].agent
        round_ = hierarchy.begin(LIKE, list(tensors))
        for name in list(tensors)[:5]:
            round_.submit(name, encode(tensors[name]), examples[name])
        assert agent.counters.checkpoints == 1
        wait_until(lambda: agent.counters.added == 5)
        os.kill(agent.pids[0], signal.SIGKILL)
        round_.submit("c5", encode(tensors["c5"]), examples["c5"])
        assert_mean(round_.result(30), tensors, examples)
        assert agent.counters.restarts == 1 and empty(hierarchy)


def test_who_fails_is_not_waited_for():
    tensors, examples = updates(7)
    with Hierarchy({"a": 4, "b": 4}, fan_in=2) as hierarchy:
        for failing in (["c0"], ["c6"], ["c0", "c1", "c2", "c3"], ["c1", "c5", "c6"]):
            round_ = hierarchy.begin(LIKE, list(tensors))
            there = {name: t for name, t in tensors.items() if name not in failing}
            for name in failing:
                round_.fail(name, "it said so")
                round_.fail(name, "it said so twice")
            for name in there:
                round_.submit(name, encode(tensors[name]), examples[name])
            total = round_.result(30)
            assert_mean(total, there, examples)
            assert set(total.refused) == set(failing) and empty(hierarchy)


def test_a_deadline_ends_the_round_with_who_is_there():
    tensors, examples = updates(5)
    with Hierarchy() as hierarchy:
        round_ = hierarchy.begin(LIKE, list(tensors))
        for name in ("c1", "c4", "c2"):
            round_.submit(name, encode(tensors[name]), examples[name])
        total = round_.result(timeout=0.05)
        assert_mean(total, {name: tensors[name] for name in ("c1", "c2", "c4")}, examples)
        assert total.refused["c0"] == "nothing came within 0.05 s"
        nobody = hierarchy.begin(LIKE, ["x", "y"])
        with pytest.raises(EmptyRound, match="y: nothing came"):
            nobody.result(timeout=0.01)
        weightless = hierarchy.begin(LIKE, ["c0"])
        weightless.submit("c0", encode(tensors["c0"]), 0)
        with pytest.raises(EmptyRound, match="weight above 0"):
            weightless.result(30)
        assert empty(hierarchy)


def test_what_the_gateway_refuses_is_named_and_not_waited_for(hierarchy):
    tensors, examples = updates(6)
    nan = {**tensors["c1"], "b": torch.full((7,), float("nan"))}
    wrong = {**tensors["c2"], "w": torch.zeros(3)}
    extra = {**tensors["c4"], "z": torch.zeros(1)}
    round_ = hierarchy.begin(LIKE, list(tensors))
    round_.submit("c0", encode(tensors["c0"]), examples["c0"])
    round_.submit("c1", encode(nan), 3)  # found when it is added
    for name, body, error, says in (
        (
            "c2",
            encode(wrong),
            PayloadMismatch,
            r"w should be float32 \[40, 25\], but is float32 \[3\]",
        ),
        ("c3", encode(tensors["c3"])[:-2], PayloadError, "cut off"),
        ("c4", encode(extra), PayloadMismatch, "z should be absent"),
    ):
        with pytest.raises(error, match=says):
            round_.submit(name, body, 3)
    with pytest.raises(ReplyRefused, match="c0 has sent its update"):
        round_.submit("c0", encode(tensors["c0"]), 3)
    with pytest.raises(ReplyRefused, match="stranger is not in it"):
        round_.submit("stranger", encode(tensors["c0"]), 3)
    with pytest.raises(PayloadError, match="-1 examples"):
        round_.submit("c5", encode(tensors["c5"]), -1)
    total = round_.result(30)
    assert_mean(total, {"c0": tensors["c0"]}, examples)
    assert sorted(total.refused) == ["c1", "c2", "c3", "c4", "c5"]
    assert "7 values" in total.refused["c1"]


@pytest.mark.parametrize(
    "bad", [["c0"], ["c3"], ["c6"], ["c1", "c2"], ["c2", "c3", "c6"], ["c4", "c5", "c6"]]
)
@pytest.mark.parametrize("eager", [True, False])
def test_updates_that_are_not_finite_are_left_out_and_counted(bad, eager):
    """In one leaf or in several, first, last, and all of a leaf."""
    like = {"x": torch.zeros(2 * CHUNK + 3)}
    tensors, examples = updates(7, like=like)
    for name in bad:
        tensors[name]["x"][[CHUNK - 1, 2 * CHUNK]] = torch.tensor([np.inf, np.nan])
    there = {name: tensors[name] for name in tensors if name not in bad}
    with Hierarchy(fan_in=4, eager=eager) as hierarchy:
        for _ in range(2):
            total = run(hierarchy, tensors, examples)
            assert_mean(total, there, examples, like)
            assert total.refused == {name: str(NotFinite(name, "the update", 2)) for name in bad}
            assert empty(hierarchy)


def test_not_finite_together_with_failing_and_a_full_store():
    tensors, examples = updates(9)
    for name in ("c2", "c7"):
        tensors[name]["b"][0] = np.nan
    there = {n: t for n, t in tensors.items() if n not in ("c0", "c2", "c7", "c8")}
    body = encode(tensors["c0"])
    with Hierarchy(fan_in=9, memory=4 * len(body)) as hierarchy:
        round_ = hierarchy.begin(LIKE, list(tensors))
        round_.fail("c0", "it said so")
        for name in list(tensors)[1:8]:
            round_.submit(name, encode(tensors[name]), examples[name])
        total = round_.result(timeout=0.3)
        assert_mean(total, there, examples)
        assert sorted(total.refused) == ["c0", "c2", "c7", "c8"] and empty(hierarchy)


def test_nothing_but_updates_that_are_not_finite_is_an_empty_round(hierarchy):
    tensors, examples = updates(5)
    for name in tensors:
        tensors[name]["scale"] = torch.tensor(-np.inf)
    with pytest.raises(EmptyRound, match="c4: reply of c4: the update has 1 values"):
        run(hierarchy, tensors, examples)
    assert empty(hierarchy)


def test_large_but_finite_values_are_not_taken_for_infinite():
    """Their sum may overflow, which is nobody's fault, in a leaf and above."""
    like = {"x": torch.zeros(3)}
    tensors = {f"c{n}": {"x": torch.tensor([3e38, 1.0, -3e38])} for n in range(6)}
    with Hierarchy(fan_in=2, accumulate="f32") as hierarchy:
        total = run(hierarchy, tensors, dict.fromkeys(tensors, 1))
        assert not total.refused
        assert total.sums["x"].tolist() == [np.inf, 6, -np.inf]
    with Hierarchy(fan_in=2) as hierarchy:
        assert_mean(
            run(hierarchy, tensors, dict.fromkeys(tensors, 1)),
            tensors,
            dict.fromkeys(tensors, 1),
            like,
        )


def test_the_memory_of_a_round_serves_the_next():
    tensors, examples = updates(6)
    with Hierarchy(fan_in=3, keep_alive=0.3) as hierarchy:
        store = hierarchy.nodes["node-0"].store
        run(hierarchy, tensors, examples)
        first, files = store.recycled, set(store.segments.folder.glob("?" * 32))
        assert empty(hierarchy) and store.spare
        assert_mean(run(hierarchy, tensors, examples), tensors, examples)
        # Six updates, the sums of two leaves and of the middle.
        assert store.recycled == first + 9
        assert set(store.segments.folder.glob("?" * 32)) == files
        wait_until(lambda: not store.spare)
        assert not list(store.segments.folder.glob("?" * 32)), "given back after keep_alive"
        assert_mean(run(hierarchy, tensors, examples), tensors, examples)


@pytest.mark.parametrize("local", [True, False])
def test_other_processes_bring_updates_by_a_link(local):
    """Local ones write into the store; what the others send goes straight there."""
    tensors, examples = updates(4)
    layout = Layout.of(LIKE)
    with Hierarchy() as hierarchy:
        gateway = hierarchy.nodes["node-0"].gateway
        address = gateway.listen() if local else gateway.listen_tcp()
        round_ = hierarchy.begin(LIKE, list(tensors))
        link = Link(address, gateway.token)
        for name in ("c0", "c1"):
            body = encode(tensors[name])
            link.deliver(name, examples[name], layout.header, body[len(layout.header) :])
        with pytest.raises(ReplyRefused, match="the header should be that of b float32"):
            link.deliver("c2", 3, b"other", b"x" * layout.size)
        link.deliver("c3", 3, layout.header, np.full(layout.elements, np.nan, np.float32))
        total = round_.result(30)
        link.close()
        assert_mean(total, {name: tensors[name] for name in ("c0", "c1")}, examples)
        assert f"{layout.elements} values that are NaN" in total.refused["c3"]
        assert gateway.received == (0 if local else 3 * layout.size)
        assert empty(hierarchy)


def test_a_local_client_trains_right_into_the_store():
    tensors, examples = updates(3)
    layout = Layout.of(LIKE)
    with Hierarchy() as hierarchy:
        gateway = hierarchy.nodes["node-0"].gateway
        address = gateway.listen()
        round_ = hierarchy.begin(LIKE, list(tensors))
        links = [Link(address, gateway.token) for _ in tensors]
        for name, link in list(zip(tensors, links, strict=True))[:2]:
            with link.writing(name, examples[name], layout.header, layout.size) as view:
                view[:] = encode(tensors[name])[len(layout.header) :]
        given_up = links[2].writing("c2", 3, layout.header, layout.size)
        given_up.__enter__()
        links[2].close()
        total = round_.result(30)
        assert_mean(total, {name: tensors[name] for name in ("c0", "c1")}, examples)
        assert total.refused["c2"] == "c2 went away while it wrote"
        for link in links:
            link.close()
        assert empty(hierarchy)


def test_nobody_writes_into_the_store_of_another_machine():
    layout = Layout.of(LIKE)
    with Hierarchy() as hierarchy:
        gateway = hierarchy.nodes["node-0"].gateway
        hierarchy.begin(LIKE, ["c0"])
        link = Link(gateway.listen_tcp(), gateway.token)
        said = pytest.raises(FederationError, match="another machine: deliver")
        with said, link.writing("c0", 1, layout.header, layout.size):
            raise AssertionError("it was given room")
        link.close()


def test_a_sender_without_the_token_or_that_hangs_up_changes_nothing():
    tensors, _ = updates(1)
    layout = Layout.of(LIKE)
    with Hierarchy() as hierarchy:
        gateway = hierarchy.nodes["node-0"].gateway
        address = gateway.listen_tcp()
        round_ = hierarchy.begin(LIKE, list(tensors))
        thief = Link(address, "guessed")
        with pytest.raises((FederationError, OSError)):
            thief.deliver("c0", 1, layout.header, b"\0" * layout.size)
        thief.close()
        half = Link(address, gateway.token)
        half._socket.sendall(b"\xff\xff\xff\xff")
        half.close()
        round_.submit("c0", encode(tensors["c0"]), 1)
        assert round_.result(30).updates == 1


def test_a_store_waits_for_room_and_says_when_none_came():
    with SharedStore(100, timeout=0.05) as store:
        with pytest.raises(StoreFull, match="101 bytes never fit"):
            store.put(b"x" * 101)
        first = store.put(b"x" * 60)
        with pytest.raises(StoreFull, match=r"50 bytes waited 0.05 s.* 1 objects take 60 of 100"):
            store.put(b"y" * 50)
        store.timeout = 20
        threading.Timer(0.05, store.release, [first]).start()
        second = store.put(b"y" * 50)
        assert store.get(second) == b"y" * 50
        store.retain(second)
        store.release(second)
        assert len(store) == 1
        store.release(second)
        assert len(store) == 0 == store.held
        with pytest.raises(KeyError, match=second.hex()):
            store.get(second)


def test_memory_that_waits_goes_to_its_owner_or_makes_room():
    def put(size, owner):
        with store.room(size, owner) as key:
            store.path(key).write_bytes(owner.encode() * size)
        return key

    with SharedStore(100, timeout=0.05) as store:
        keys = {owner: put(40, owner) for owner in "ab"}
        places = {owner: store.path(key) for owner, key in keys.items()}
        for key in keys.values():
            store.release(key)
        assert (store.held, store.spare) == (0, 80)
        again = {owner: put(40, owner) for owner in "ba"}
        assert {owner: store.path(key) for owner, key in again.items()} == places
        assert store.recycled == 2 and not set(again.values()) & set(keys.values())
        assert {owner: bytes(store.get(key)) for owner, key in again.items()} == {
            owner: owner.encode() * 40 for owner in "ab"
        }
        store.release(again["a"])
        other = put(60, "c")
        assert not places["a"].exists() and (store.held, store.spare) == (100, 0)
        store.release(other)
        store.trim(since=0)
        assert store.spare == 60
        store.trim()
        assert store.spare == 0 and len(list(store.segments.folder.glob("?" * 32))) == 1
        draft = store.draft(40)
        assert store.held == 40, "a draft does not count"
        store.path(draft).write_bytes(b"x" * 40)
        store.discard(draft)
        assert len(list(store.segments.folder.glob("?" * 32))) == 1


def test_a_draft_that_fails_or_has_another_size_is_not_kept():
    with SharedStore(100) as store:
        with pytest.raises(ZeroDivisionError), store.room(10):
            raise ZeroDivisionError
        said = pytest.raises(FederationError, match="10 bytes was announced; it has 3")
        with said, store.room(10) as key:
            store.path(key).write_bytes(b"abc")
        assert len(store) == 0 and not list(store.segments.folder.glob("?" * 32))


def test_what_cannot_be_is_said_at_the_start():
    with pytest.raises(ConfigurationError, match="fan_in"):
        Hierarchy(fan_in=1)
    with pytest.raises(ConfigurationError, match="capacity above 0"):
        Hierarchy({"a": 0})
    with pytest.raises(ConfigurationError, match="more than 0 bytes"):
        SharedStore(0)
    with pytest.raises(TopologyError, match="FedAvgServer folds"):
        require_mean(FedAvg(rule=Krum(1)).server(LIKE))
    with pytest.raises(TopologyError, match="'n' is i64"):
        Layout.of({"n": torch.zeros(3, dtype=torch.int64)})
    with pytest.raises(TopologyError, match="without a single value"):
        Layout.of({"n": torch.zeros(0)})
    with Hierarchy(memory=1000) as hierarchy:
        with pytest.raises(ConfigurationError, match="fits into no store"):
            hierarchy.begin(LIKE, ["a"])
        with pytest.raises(EmptyRound, match="without clients"):
            hierarchy.begin(LIKE, [])
        small = {"x": torch.zeros(2)}
        with pytest.raises(ConfigurationError, match="takes part twice"):
            hierarchy.begin(small, ["a", "a"])
        hierarchy.begin(small, ["a"])
        with pytest.raises(FederationError, match="round before is not over"):
            hierarchy.begin(small, ["a"])


def test_aggregators_end_with_their_owner_and_the_next_owner_sweeps():
    code = (
        "import torch, sys, time\n"
        "from anabranch.federated.aggregation.tree import Hierarchy\n"
        "from anabranch.federated.payload import encode\n"
        "like = {'x': torch.zeros(10)}\n"
        "h = Hierarchy(); r = h.begin(like, ['a', 'b']); r.submit('a', encode(like), 1)\n"
        "node = h.nodes['node-0']\n"
        "print(node.agent.pids[0], node.store.segments.folder, flush=True)\n"
        "time.sleep(60)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pid, folder = owner.stdout.readline().split()
    aggregator = psutil.Process(int(pid))
    owner.kill()
    owner.wait()
    owner.stdout.close()
    aggregator.wait(timeout=5)
    assert shared_memory().joinpath(folder).exists()
    SharedStore(10).close()
    assert not shared_memory().joinpath(folder).exists()


@given(
    st.integers(1, 2 * CHUNK + 5),
    st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=6),
    st.data(),
)
@settings(max_examples=20, deadline=None)
def test_adding_in_chunks_and_several_at_once_is_adding(elements, weights, data):
    rng = np.random.default_rng(elements)
    total = np.full(elements, np.nan)
    made, expected, left = Sum(total), np.zeros(elements), list(weights)
    while left:
        together = left[: data.draw(st.integers(1, len(left)))]
        del left[: len(together)]
        addends = []
        for weight in together:
            split = data.draw(st.integers(0, elements))
            values = rng.standard_normal(elements).astype(np.float32)
            runs = [("f64", split), ("f32", elements - split)]
            parts = values[:split].astype(np.float64).tobytes() + values[split:].tobytes()
            addends.append(Addend(parts, runs, weight))
            expected += values.astype(np.float64) * weight
        assert made.fold(addends) == {}
    assert np.array_equal(total, expected)
