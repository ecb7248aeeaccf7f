"""The desk between coordinator and sites, with a clock of its own."""

from __future__ import annotations

from anabranch.federated import Task
from anabranch.federated.runtimes import ClientJoined, ClientLeft
from anabranch.federated.runtimes.network.desk import REMEMBERED, Desk

MEMBERS = {"a": 3, "b": 4}


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def task(number, client="a", settled=0):
    return Task(number, client, "train", 0, 0.0, settled=settled, body=b"body")


def test_who_is_there():
    clock = Clock()
    desk = Desk(10.0, clock)
    assert desk.count(MEMBERS) == {}
    desk.hear("a")
    desk.hear("stranger")
    assert desk.count(MEMBERS) == {"a": 3} and desk.changes(MEMBERS) == []
    desk.hear("b")
    assert desk.changes(MEMBERS) == [ClientJoined("b", 4)]
    clock.now = 10.0
    desk.hear("b")
    assert desk.changes(MEMBERS) == []
    clock.now = 10.1
    assert desk.changes(MEMBERS) == [ClientLeft("a")]
    assert desk.changes(MEMBERS) == []
    desk.hear("a")
    assert desk.changes(MEMBERS) == [ClientJoined("a", 3)]
    assert desk.changes({"b": 4}) == [ClientLeft("a")]  # revoked


def test_a_task_waits_until_it_is_done():
    desk = Desk(10.0)
    assert desk.next_task("a") is None
    for number in (2, 1):
        desk.give(task(number))
    desk.give(task(3, "b"))
    assert desk.next_task("a") == desk.next_task("a") == task(1)
    desk.done(task(1))
    desk.done(task(1))
    assert desk.next_task("a") == task(2)
    assert desk.sent(1).client == "a" and desk.sent(1).body == b""
    assert desk.sent(4) is None


def test_tasks_of_a_site_that_left_are_over():
    clock = Clock()
    desk = Desk(1.0, clock)
    desk.hear("a")
    desk.count(MEMBERS)
    desk.give(task(1))
    clock.now = 2.0
    desk.changes(MEMBERS)
    assert desk.next_task("a") is None
    assert desk.sent(1) is not None  # its reply is still told from a stranger's


def test_memory_is_bounded():
    desk = Desk(1.0)
    for number in range(1, 1000):
        desk.give(task(number, settled=number))
        desk.done(task(number))
    known = [number for number in range(1, 1000) if desk.sent(number)]
    assert len(known) == REMEMBERED and known[-1] == 999


def test_the_end_is_told_to_those_who_are_there():
    desk = Desk(10.0)
    for name in MEMBERS:
        desk.hear(name)
    desk.count(MEMBERS)
    assert desk.tell_end("a") is None
    desk.finish("finished")
    assert desk.unaware() == {"a", "b"}
    assert desk.tell_end("a") == "finished"
    assert desk.unaware() == {"b"}
