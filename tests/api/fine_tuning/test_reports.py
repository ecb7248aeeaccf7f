"""What a job says, on its way to the store."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from anabranch.api.fine_tuning import runner
from anabranch.api.fine_tuning.handover import Handover
from anabranch.jobs import NewEvent, Report
from anabranch.serving.coserving.job import JobEvent, JobProgress


def step(number: int) -> JobEvent:
    return JobEvent("step", JobProgress("running", step=number))


def test_the_handover_is_bounded_ordered_and_keeps_the_newest() -> None:
    handover = Handover(most=3)
    for number in range(10):
        handover.put("a", step(number))
    handover.put("b", step(0))
    state = JobEvent("state", JobProgress("succeeded", step=9))
    handover.put("a", state)
    events, skipped = handover.take(0)
    assert [e.progress.step for job, e in events if job == "a"] == [0, 1, 2, 9, 9]
    assert events[-1] == ("b", step(0)) or ("b", step(0)) in events
    assert [e for job, e in events if job == "a"][-1] == state
    assert skipped == {"a": 6}
    assert handover.take(0) == ([], {})


notes = st.builds(NewEvent, st.just("k"), st.text("ab", max_size=2))
reports = st.builds(
    Report,
    st.sampled_from("xy"),
    st.sampled_from([None, None, "paused", "running"]),
    st.one_of(st.none(), st.dictionaries(st.just("step"), st.integers(0, 9))),
    st.sampled_from([None, "e"]),
    st.lists(notes, max_size=2),
)


@given(st.lists(reports, max_size=12))
def test_merged_reports_say_the_same(given_: list[Report]) -> None:
    merged = runner.merged(given_)
    for job in "xy":
        before, after = ([r for r in each if r.job_id == job] for each in (given_, merged))
        assert [e for r in after for e in r.events] == [e for r in before for e in r.events]
        assert [r.state for r in after if r.state] == [r.state for r in before if r.state]
        for name in ("progress", "error"):
            told = [
                [getattr(r, name) for r in each if getattr(r, name) is not None]
                for each in (before, after)
            ]
            assert told[0][-1:] == told[1][-1:]
        assert all(r.state for r in after[1:])
