"""The job store: transitions, leases between processes, pages, and kill -9."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from sqlalchemy import text

from anabranch.errors import InvalidRequest
from anabranch.jobs import (
    FINISHED,
    Artefact,
    ForbiddenTransition,
    Job,
    JobStore,
    NewEvent,
    Report,
    State,
    UnknownJob,
    allowed,
    database,
    process,
)
from anabranch.jobs.errors import NameTaken, StoreUnusable
from anabranch.jobs.states import TRANSITIONS

KIND = "test"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return database.sqlite_url(tmp_path / "jobs.sqlite")
    return str(request.getfixturevalue("empty_postgresql"))


@pytest.fixture
def store(url: str, clock: Clock) -> Iterator[JobStore]:
    opened = JobStore(url, clock=clock)
    yield opened
    opened.close()


def test_the_life_of_a_job(store: JobStore) -> None:
    made = store.create(KIND, {"x": [1]}, target="m", owner="o", notes=[NewEvent("a", "created")])
    assert (made.state, made.spec, made.started, made.lease) == ("queued", {"x": [1]}, None, None)
    assert store.claim(["other"], ["m"]) is None
    assert store.claim([KIND], ["n"]) is None
    running = store.claim([KIND], ["m"])
    assert running is not None
    assert (running.id, running.state, running.lease) == (made.id, "running", store.process)
    assert running.started is not None
    assert store.claim([KIND], ["m"]) is None
    notes = [NewEvent("b", "one", data={"loss": 1.5}), NewEvent("b", "two", "warn")]
    assert store.record([Report(made.id, progress={"step": 1}, events=notes)]) == set()
    made_of = [Artefact("file", "/somewhere", 3, "abc")]
    store.record([Report(made.id, "succeeded", artefacts=made_of)])
    done = store.get(made.id, "o")
    assert (done.state, done.progress, done.lease) == ("succeeded", {"step": 1}, None)
    assert done.finished is not None
    events = store.events(made.id).items
    assert [(e.sequence, e.message, e.level) for e in events] == [
        (1, "created", "info"),
        (2, "one", "info"),
        (3, "two", "warn"),
    ]
    assert store.artefacts(made.id) == {made.id: {"file": made_of[0]}}
    # Nothing is written about a job that nobody holds.
    assert store.record([Report(made.id, progress={"step": 9})]) == {made.id}
    assert store.get(made.id).progress == {"step": 1}


def test_owners_do_not_see_each_other(store: JobStore) -> None:
    mine, open_to_all = store.create(KIND, {}, owner="a"), store.create(KIND, {})
    for method in (store.get, lambda i, o: store.ask(i, "cancel", o)):
        with pytest.raises(UnknownJob):
            method(mine.id, "b")
    assert [job.id for job in store.find(KIND, owner="a").items] == [mine.id]
    assert [job.id for job in store.find(KIND).items] == [open_to_all.id, mine.id]
    with pytest.raises(InvalidRequest, match="after"):
        store.find(KIND, owner="b", after=mine.id)


def test_pages_and_labels(store: JobStore) -> None:
    ids = [store.create(KIND, {"metadata": {"run": str(n % 2), "k k": "x"}}).id for n in range(7)]
    seen: list[str] = []
    after, more = None, True
    while more:
        page = store.find(KIND, after=after, limit=3)
        assert 1 <= len(page.items) <= 3
        seen += [job.id for job in page.items]
        after, more = seen[-1], page.has_more
    assert seen == ids[::-1]
    odd = store.find(KIND, labels={"run": "1", "k k": "x"})
    assert [job.id for job in odd.items] == ids[1::2][::-1]
    assert store.find(KIND, labels={"run": "2"}).items == []
    with pytest.raises(InvalidRequest, match="after"):
        store.find(KIND, after="job-none")


def test_events_page_both_ways(store: JobStore) -> None:
    job = store.create(KIND, {}, notes=[NewEvent("ab"[n % 2], str(n)) for n in range(5)])
    up = store.events(job.id, limit=3)
    assert ([e.message for e in up.items], up.has_more) == (["0", "1", "2"], True)
    assert [e.message for e in store.events(job.id, after=3).items] == ["3", "4"]
    down = store.events(job.id, after=3, descending=True, kind="a")
    assert ([e.message for e in down.items], down.has_more) == (["0"], False)


def test_priority_then_age(store: JobStore) -> None:
    ids = [store.create(KIND, {}, target="m", priority=p).id for p in (0, 5, 0, 5)]
    claimed = [store.claim([KIND], ["m"]) for _ in ids]
    assert [job and job.id for job in claimed] == [ids[1], ids[3], ids[0], ids[2]]


def test_a_name_is_made_by_one_unfinished_job(store: JobStore) -> None:
    first = store.create(KIND, {}, target="m", name="tone", exclusive=True)
    store.create(KIND, {}, target="other", name="tone", exclusive=True)
    with pytest.raises(NameTaken, match="'tone'"):
        store.create(KIND, {}, target="m", name="tone", exclusive=True)
    store.ask(first.id, "cancel")
    store.create(KIND, {}, target="m", name="tone", exclusive=True)


def test_two_stores_compete_for_every_job(url: str, store: JobStore) -> None:
    other = JobStore(url, clock=store.clock)
    assert store.process != other.process
    ids = {store.create(KIND, {}, target="m").id for _ in range(10)}
    got: list[Job] = []
    for turn in range(12):
        job = (store, other)[turn % 2].claim([KIND], ["m"])
        got += [job] if job else []
    assert {job.id for job in got} == ids
    assert len(got) == 10
    theirs = next(job for job in got if job.lease == other.process)
    assert store.record([Report(theirs.id, "failed")]) == {theirs.id}
    assert store.get(theirs.id).state == "running"
    assert set(other.wishes()) == {job.id for job in got if job.lease == other.process}
    other.close()


def test_a_lease_that_nobody_renews_expires(url: str) -> None:
    first, second = Clock(), Clock()
    holder, rival = (JobStore(url, lease_seconds=30, clock=c) for c in (first, second))
    job = holder.create(KIND, {}, target="m")
    assert holder.claim([KIND], ["m"]) is not None
    second.now = first.now + 29
    assert rival.claim([KIND], ["m"]) is None
    first.now += 20
    holder.beat()
    second.now = first.now + 29
    assert rival.claim([KIND], ["m"]) is None
    second.now = first.now + 31
    taken = rival.claim([KIND], ["m"])
    assert taken is not None
    assert taken.id == job.id
    assert holder.record([Report(job.id, "succeeded")]) == {job.id}
    assert holder.wishes() == {}
    for each in (holder, rival):
        each.close()


def test_a_released_job_is_still_running_and_free(url: str, store: JobStore) -> None:
    job = store.create(KIND, {}, target="m")
    store.claim([KIND], ["m"])
    store.release([KIND])
    assert (store.get(job.id).state, store.get(job.id).lease) == ("running", None)
    other = JobStore(url)
    again = other.claim([KIND], ["m"])
    assert again is not None
    assert again.started == store.get(job.id).started
    other.close()


def test_asking(store: JobStore) -> None:
    job = store.create(KIND, {}, target="m")
    assert store.ask(job.id, "pause").state == "paused"
    assert store.claim([KIND], ["m"]) is None
    assert store.ask(job.id, "run").state == "queued"
    assert store.claim([KIND], ["m"]) is not None
    # It is held now: its process reads the wish and reports what came of it.
    asked = store.ask(job.id, "pause")
    assert (asked.state, asked.wanted) == ("running", "pause")
    assert store.wishes()[job.id].wanted == "pause"
    store.record([Report(job.id, "paused")])
    # It goes back into the queue, of which only its holder can take it.
    assert store.ask(job.id, "run").state == "queued"
    again = store.claim([KIND], ["m"])
    assert again is not None
    assert again.lease == store.process
    store.ask(job.id, "cancel")
    store.release([KIND])
    # What was asked of a process that is gone is carried out by the next one.
    assert store.claim([KIND], ["m"]) is None
    assert store.get(job.id).state == "cancelled"
    for wanted in ("run", "pause", "cancel"):
        if wanted == "cancel":
            assert store.ask(job.id, "cancel").state == "cancelled"
        else:
            with pytest.raises(ForbiddenTransition, match="cancelled and cannot"):
                store.ask(job.id, wanted)  # type: ignore[arg-type]


def test_a_forbidden_report_writes_nothing(store: JobStore) -> None:
    ids = [store.create(KIND, {}, target="m").id for _ in range(2)]
    for _ in ids:
        store.claim([KIND], ["m"])
    reports = [Report(ids[0], progress={"step": 1}), Report(ids[1], "queued")]
    with pytest.raises(ForbiddenTransition, match="running and cannot become queued"):
        store.record(reports)
    assert store.get(ids[0]).progress == {}


@pytest.mark.parametrize("bad", ["nonsense", "nosuchdb://host/x", "sqlite:////no/such/folder/x"])
def test_an_address_that_cannot_work_is_refused(bad: str) -> None:
    with pytest.raises(StoreUnusable, match="job store"):
        JobStore(bad)


def test_sqlite_keeps_what_it_promised(tmp_path: Path) -> None:
    store = JobStore(database.sqlite_url(tmp_path / "jobs.sqlite"))
    with store.engine.begin() as connection:
        assert connection.execute(text("PRAGMA journal_mode")).scalar() == "wal"
        assert connection.execute(text("PRAGMA synchronous")).scalar() == 2


def test_whoever_opens_a_new_store_at_the_same_time_finds_one(url: str) -> None:
    def open_and_close(_: int) -> str:
        store = JobStore(url)
        made = store.create(KIND, {}, target="m").id
        store.close()
        return made

    with ThreadPoolExecutor(8) as pool:
        ids = set(pool.map(open_and_close, range(8)))
    store = JobStore(url)
    assert {job.id for job in store.find(KIND).items} == ids
    store.close()


def test_of_several_that_want_a_name_at_the_same_time_one_gets_it(store: JobStore) -> None:
    def create(_: int) -> bool:
        try:
            store.create(KIND, {}, target="m", name="tone", exclusive=True)
        except NameTaken:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(create, range(8))) == 1


def test_processes_are_told_apart() -> None:
    name = process.own_name()
    assert name != process.own_name()
    assert not process.is_gone(name)
    place, pid, started, word = name.rsplit("/", 3)
    assert process.is_gone(f"{place}/{pid}/{float(started) - 100:.2f}/{word}")
    assert not process.is_gone(f"elsewhere/pid:[1]/{pid}/1.00/{word}")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert process.is_gone(f"{place}/{ended.pid}/{started}/{word}")


WRITER = """
import sys
from anabranch.jobs import JobStore, NewEvent, Report
store = JobStore(sys.argv[1])
job = store.claim(["test"], ["m"])
step = 0
while True:
    step += 1
    note = NewEvent("step", str(step))
    store.record([Report(job.id, progress={"step": step}, events=[note])])
    print(step, flush=True)
"""


def test_kill_9_loses_nothing_and_frees_the_job_at_once(url: str, store: JobStore) -> None:
    job = store.create(KIND, {}, target="m")
    store.clock = time.time
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, url], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    told = 0
    while told < 20:
        told = int(writer.stdout.readline())
    assert store.claim([KIND], ["m"]) is None
    writer.send_signal(signal.SIGKILL)
    told = max([told, *map(int, writer.stdout.read().split())])
    writer.wait()
    # Its lease is fresh, but its process is known to be gone.
    taken = store.claim([KIND], ["m"])
    assert taken is not None
    assert taken.id == job.id
    step = taken.progress["step"]
    assert told <= step <= told + 1
    events = store.events(job.id, limit=10_000).items
    assert [e.sequence for e in events] == list(range(1, step + 1))
    assert [e.message for e in events] == [str(n) for n in range(1, step + 1)]


CLAIMER = """
import sys
from anabranch.jobs import JobStore
store = JobStore(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
while (job := store.claim(["test"], ["m"])) is not None:
    print(job.id, flush=True)
sys.stdin.readline()
"""


def test_processes_that_compete_share_the_jobs(url: str, store: JobStore) -> None:
    ids = {store.create(KIND, {}, target="m").id for _ in range(30)}
    rivals = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIMER, url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for rival in rivals:
        assert rival.stdout is not None
        assert rival.stdout.readline() == "ready\n"
    for rival in rivals:
        assert rival.stdin is not None
        rival.stdin.write("go\n")
        rival.stdin.flush()
    claimed: list[str] = []
    while len(claimed) < len(ids):
        for rival in rivals:
            assert rival.stdout is not None
            owned = [job for job in store.find(KIND, limit=100).items if job.lease is not None]
            claimed = [job.id for job in owned]
    lines = [rival.communicate("end\n")[0].split() for rival in rivals]
    assert sorted(lines[0] + lines[1]) == sorted(ids)


class StateMachine(RuleBasedStateMachine):
    """Whatever is asked and reported, a job only ever takes allowed steps."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.stores = [JobStore("sqlite:///:memory:", clock=self.clock)]
        self.store = self.stores[0]
        self.job = self.store.create(KIND, {}, target="m")
        self.last: State = "queued"

    def teardown(self) -> None:
        self.store.close()

    @rule(wanted=st.sampled_from(["run", "pause", "cancel"]))
    def ask(self, wanted: str) -> None:
        before = self.store.get(self.job.id)
        try:
            after = self.store.ask(self.job.id, wanted)  # type: ignore[arg-type]
        except ForbiddenTransition:
            assert self.store.get(self.job.id) == before
            assert before.state in FINISHED
        else:
            assert after.wanted == wanted

    @rule()
    def claim(self) -> None:
        before = self.store.get(self.job.id)
        claimed = self.store.claim([KIND], ["m"])
        now = self.store.get(self.job.id)
        if claimed is not None:
            assert claimed == now
            assert before.state in ("queued", "running")
            assert (now.state, now.lease) == ("running", self.store.process)
        else:
            held = before.lease is not None and before.state == "running"
            unwanted = before.state == "running" and before.wanted != "run"
            assert before.state in FINISHED | {"paused"} or held or unwanted

    @rule(state=st.sampled_from(get_args(State)))
    def report(self, state: State) -> None:
        before = self.store.get(self.job.id)
        try:
            lost = self.store.record([Report(self.job.id, state)])
        except ForbiddenTransition:
            assert not allowed(before.state, state)
            assert self.store.get(self.job.id) == before
            return
        now = self.store.get(self.job.id)
        assert now.state == (before.state if lost else state)
        assert bool(lost) == (before.lease != self.store.process)

    @rule()
    def restart(self) -> None:
        self.store.release([KIND])

    @precondition(lambda self: self.last in FINISHED)
    @invariant()
    def finished_is_final(self) -> None:
        assert self.store.get(self.job.id).state == self.last

    @invariant()
    def steps_are_allowed(self) -> None:
        job = self.store.get(self.job.id)
        # A rule may take two steps at once: a claim that finds the wish of a dead process.
        reached = {self.last, *TRANSITIONS[self.last]}
        reached |= {further for state in reached for further in TRANSITIONS[state]}
        assert job.state in reached
        assert (job.finished is not None) == (job.state in FINISHED)
        assert job.lease is None or job.state not in FINISHED
        assert job.started is not None or job.state != "running"
        self.last = job.state


TestStateMachine = StateMachine.TestCase
TestStateMachine.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)


def test_the_engine_and_the_store_have_the_same_states() -> None:
    from anabranch.serving.coserving import job

    assert set(get_args(State)) == set(get_args(job.JobState))
    assert FINISHED == job.FINISHED
