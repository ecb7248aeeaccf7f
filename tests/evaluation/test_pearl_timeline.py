"""Schedules on paper against the engine's, and against counting by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.evaluation.speculation.pearl_timeline import (
    CallTimes,
    Timeline,
    autoregressive,
    pearl,
    standing,
    together,
    vanilla,
)
from anabranch.serving.speculation.controller import FixedLength
from anabranch.serving.speculation.pearl import Pearl
from tests import tiny
from tests.serving.speculation.helpers import Table, markov, table_engine
from tests.serving.speculation.test_pearl import tables

TIMES = CallTimes((4.0, 4.0, 4.0), 1.0)
BITS = st.lists(st.booleans(), min_size=1, max_size=40)


@pytest.mark.parametrize("window", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(4))
def test_the_engine_keeps_to_the_schedules(seed: int, window: int) -> None:
    """Steps, drafted tokens and accepted tokens of both ways to draft, token by token."""
    vocabulary, length = 1000, 60  # so many that the text does not go round in circles
    target = markov(seed, vocabulary)
    draft = target + markov(seed + 10, vocabulary, 0.4)
    request = tiny.greedy([1, 2, 3], length)
    engine = tables(Table(target), Table(draft), window)
    (text,) = engine.generate([request])["r"]
    stands = standing(text[1:], target[text[:-1]], draft[text[:-1]], None)
    assert 10 < sum(stands) < 50

    expected = pearl(stands, TIMES, window)
    proposer = engine.speculation.proposer
    assert isinstance(proposer, Pearl)
    assert engine.statistics().steps == 1 + expected.target_calls
    assert engine.statistics().accepted_tokens == expected.accepted
    assert sum(each.drafted for each in proposer.statistics.rounds) == expected.draft_calls

    engine = table_engine(target, draft, 1)
    engine.speculation.controller = FixedLength(window)
    assert engine.generate([request])["r"] == [text]
    expected = vanilla(stands, TIMES, window)
    assert engine.statistics().steps == 1 + expected.target_calls
    assert engine.statistics().accepted_tokens == expected.accepted
    assert engine.statistics().drafted_tokens == expected.draft_calls


def test_where_everything_stands() -> None:
    """12 tokens in windows of 4, a target call takes 4 s and a drafted token 1 s."""
    stands = [True] * 12
    assert autoregressive(stands, TIMES).seconds == 48.0
    # 4 drafted, 5 emitted; twice; then 1 drafted, 2 emitted.
    assert vanilla(stands, TIMES, 4) == Timeline(12, 4 + 4 + 4 + 4 + 1 + 4, 3, 9, 9, 3)
    # 1 tested, then 4, 4, and 3 that are left; only the first window is begun anew.
    assert pearl(stands, TIMES, 4) == Timeline(12, 16.0, 4, 12, 12, 1)
    # The first window is waited for, then three are verified.
    assert pearl(stands, TIMES, 4, pre_verify=False) == Timeline(12, 4 + 12.0, 3, 12, 12, 1)
    # 1 tested, 3 verified and 1 added; twice; then 1 tested and one row for the last.
    only_pre = pearl(stands, TIMES, 4, post_verify=False)
    assert (only_pre.target_calls, only_pre.seconds) == (6, 24.0)


def test_where_nothing_stands() -> None:
    stands = [False] * 8
    assert pearl(stands, TIMES, 4).seconds == autoregressive(stands, TIMES).seconds == 32.0
    assert pearl(stands, TIMES, 4, post_verify=False).seconds == 32.0
    assert vanilla(stands, TIMES, 4).seconds == 8 * 4 + 4 * 4 + 3 + 2 + 1 + 0
    assert pearl(stands, TIMES, 4, pre_verify=False).seconds == 8 * 4 + 4 * 4 + 3 * 1 + 2 + 1 + 3
    assert pearl(stands, TIMES, 4).accepted_length == 0.0


@given(BITS, st.integers(1, 9), st.booleans(), st.booleans())
def test_every_schedule_writes_the_whole_text(
    stands: list[bool], window: int, pre: bool, post: bool
) -> None:
    for found in (vanilla(stands, TIMES, window), pearl(stands, TIMES, window, pre, post)):
        assert found.tokens == len(stands)
        assert found.accepted <= sum(stands)
        assert 1 <= found.target_calls <= len(stands)
        assert found.seconds >= 4.0 * found.target_calls
    both, one = pearl(stands, TIMES, window), together([pearl(stands, TIMES, window)])
    assert both == one
    # A target call beside a window that takes no longer is never wasted.
    if window <= 4:
        assert both.seconds <= autoregressive(stands, TIMES).seconds


def test_windows_fit_into_a_call_of_the_target() -> None:
    assert CallTimes((4.0, 4.0), 1.0).window() == 4
    assert CallTimes((1.0,), 2.0).window() == 1
    assert CallTimes((100.0,), 1.0).window() == 16
    assert CallTimes((2.0, 3.0, 4.0), 1.0).verify(5) == 6.0
    assert CallTimes((3.0, 3.5, 4.0), 1.0).window(5) == 5


def test_drawn_tokens_stand_as_often_as_the_laws_overlap() -> None:
    target, draft = markov(1, 4)[:1], markov(2, 4)[:1]
    p, q = target.softmax(-1)[0], draft.softmax(-1)[0]
    count = 40_000
    text = torch.multinomial(
        p, count, replacement=True, generator=torch.Generator().manual_seed(0)
    ).tolist()
    stands = standing(text, target.expand(count, 4), draft.expand(count, 4), 0)
    assert sum(stands) / count == pytest.approx(float(torch.minimum(p, q).sum()), abs=0.01)
