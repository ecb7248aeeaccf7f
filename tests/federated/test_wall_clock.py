"""Real time: one inbox, timers between what arrives, and an end when nothing can happen."""

from __future__ import annotations

import threading
import time

import pytest

from anabranch.federated.codecs import Identity
from anabranch.federated.node import Agreement
from anabranch.federated.runtimes import Fired, Lost
from anabranch.federated.runtimes import wall_clock as module
from anabranch.federated.runtimes.wall_clock import WallClock
from anabranch.federated.wire import Wire
from tests.federated.helpers import VectorClient

AGREEMENT = Agreement(VectorClient(), 0, Wire(), Identity(), Identity())


class Bare(WallClock):
    """Nothing happens unless a test says so."""

    under_way = False

    def clients(self):
        return {}

    def submit(self, task):
        raise AssertionError("nobody is there")

    def alive(self):
        return self.under_way


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(module, "LOOK_AROUND_S", 0.02)
    made = Bare()
    made.open(AGREEMENT)
    return made


def test_what_arrives_comes_in_order_and_time_never_goes_back(clock):
    for number in range(5):
        clock.report(Lost(number, ""))
    inputs = [clock.next_input() for _ in range(5)]
    assert [each.input.task for each in inputs] == list(range(5))
    assert sorted(each.at for each in inputs) == [each.at for each in inputs]
    assert clock.now() >= inputs[-1].at >= 0


def test_the_end_is_when_no_timer_is_set_and_nothing_is_under_way(clock):
    assert clock.next_input() is None
    clock.under_way = True
    threading.Timer(0.05, clock.report, [Lost(7, "")]).start()
    assert clock.next_input().input == Lost(7, "")
    clock.under_way = False
    assert clock.next_input() is None


def test_timers_fire_when_due_and_by_number_at_one_time(clock):
    at = clock.now() + 0.03
    for number in (3, 1, 2):
        clock.set_timer(at, number)
    clock.set_timer(0.0, 9)
    fired = [clock.next_input() for _ in range(4)]
    assert [each.input for each in fired] == [Fired(9), Fired(1), Fired(2), Fired(3)]
    assert all(each.at >= at for each in fired[1:])


def test_what_came_goes_before_a_timer_that_is_due(clock):
    clock.report(Lost(1, ""))
    clock.set_timer(0.0, 1)
    assert [clock.next_input().input for _ in range(2)] == [Lost(1, ""), Fired(1)]


def test_a_resumed_run_goes_on_where_it_was_without_the_pause(clock):
    time.sleep(0.05)
    clock.open(AGREEMENT, resumed=100.0)
    assert 100.0 <= clock.now() < 100.04
    clock.set_timer(99.0, 4)
    happened = clock.next_input()
    assert happened.input == Fired(4) and happened.at >= 100.0
