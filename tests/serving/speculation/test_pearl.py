"""PEARL: two models at the same time, and what is emitted is the target's alone."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import ConfigurationError
from anabranch.models.constraint import OutputConstraint
from anabranch.models.protocol import SamplingParameters
from anabranch.serving import Engine, EngineOptions, Request
from anabranch.serving.batch import StepPlan, StepResult
from anabranch.serving.runner.fused import FusedRunner
from anabranch.serving.sequence import Segment
from anabranch.serving.sequence import Sequence as TokenSequence
from anabranch.serving.speculation import Proposal
from anabranch.serving.speculation.drafting import Tree
from anabranch.serving.speculation.errors import VocabularyMismatch
from anabranch.serving.speculation.pearl import LONGEST_WINDOW, Pearl, share_threads
from anabranch.serving.speculation.verification import Rejection, _match
from tests import tiny
from tests.serving.constraints.tiny_tokenizers import ROWS, byte_level, compiler
from tests.serving.speculation.helpers import Table, markov
from tests.serving.speculation.test_engine import (
    PROMPTS,
    SAMPLING,
    assert_law,
    engine_on,
    fused,
    outputs_of,
)
from tests.serving.test_fused_runner import rounded


@cache
def small() -> FusedRunner:
    """Drafts badly: the first of the target's two layers."""
    return FusedRunner(rounded("LlamaConfig", {"num_hidden_layers": 1}), 512, 32)


@cache
def twin() -> FusedRunner:
    """Drafts as the target would."""
    return FusedRunner(rounded("LlamaConfig", {}), 512, 32)


def pearl_on(draft: Any, window: int | None = 4, **options: Any) -> Engine:
    return engine_on(
        fused(), speculation="pearl", draft_runner=draft, draft_tokens=window, **options
    )


def pearl_of(engine: Engine) -> Pearl:
    proposer = engine.speculation.proposer
    assert isinstance(proposer, Pearl)
    return proposer


def tables(target: Any, draft: Any, window: int | None, **options: Any) -> Engine:
    limits = {name: options.pop(name) for name in ("end_tokens", "clock") if name in options}
    return Engine(
        target,
        options=EngineOptions(
            kv_memory=4000, page_size=16, speculation="pearl", draft_tokens=window, **options
        ),
        draft_runner=draft,
        **limits,
    )


def plain(target: Any, **limits: Any) -> Engine:
    options = EngineOptions(kv_memory=4000, page_size=16, speculation="off")
    return Engine(target, options=options, **limits)


def assert_settled(engine: Engine) -> None:
    """Both caches are empty, and every drafted token has been accounted for."""
    for manager in (engine.cache, pearl_of(engine)._cache):
        manager.check_integrity()
        assert manager.usage == 0.0
    assert not pearl_of(engine)._mirrors


# What is emitted


@settings(max_examples=30, deadline=None)
@given(
    wanted=st.lists(st.tuples(st.sampled_from(PROMPTS), SAMPLING), min_size=1, max_size=4),
    right=st.booleans(),
    window=st.sampled_from([1, 2, 5, None]),
    budget=st.sampled_from([None, 3, 11]),
    pages=st.sampled_from([200, 12]),
)
def test_greedy_answers_are_the_targets(
    wanted: list[Any], right: bool, window: int | None, budget: int | None, pages: int
) -> None:
    """Tokens, log-probabilities, text and ends, with penalties, choices, and preemption."""
    requests = [
        Request(str(i), prompt, SamplingParameters(**{**sampling, "temperature": 0.0}))
        for i, (prompt, sampling) in enumerate(wanted)
    ]
    options = {"tokenizer": tiny.byte_tokenizer(), "token_budget": budget, "pages": pages}
    expected = outputs_of(engine_on(fused(), speculation="off", **options), requests)
    engine = pearl_on(twin() if right else small(), window, **options)
    assert outputs_of(engine, requests) == expected
    assert_settled(engine)
    totals = pearl_of(engine).statistics
    assert totals.accepted + totals.wasted == sum(each.drafted for each in totals.rounds)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_with_the_target_as_its_own_draft_all_windows_follow_each_other(temperature: float) -> None:
    """One step tests the first token of a window, all others a whole one; nothing is added."""
    window, length = 4, 62
    engine = pearl_on(twin(), window)
    sampling = SamplingParameters(max_tokens=length, temperature=temperature, seed=1)
    engine.generate([Request(str(i), prompt, sampling) for i, prompt in enumerate(PROMPTS)])
    totals, statistics = pearl_of(engine).statistics, engine.statistics()
    assert (totals.refusals, totals.wasted) == (0, 0)
    assert totals.accepted == statistics.accepted_tokens == statistics.drafted_tokens
    first, *rest = totals.rounds
    assert (first.pre, first.post) == (len(PROMPTS), 0)
    assert all((each.pre, each.post) == (0, len(PROMPTS)) for each in rest)
    assert statistics.steps == 1 + 1 + (length - 2) // window
    assert_settled(engine)


@pytest.mark.slow
@pytest.mark.parametrize(("window", "choices"), [(1, 128), (2, 7), (3, 128)])
def test_the_law_of_drawn_answers_is_the_targets(window: int, choices: int) -> None:
    vocabulary, length = 3, 4
    target, draft = markov(0, vocabulary), markov(1, vocabulary)
    engine = tables(Table(target), Table(draft), window)
    counts: Counter[tuple[int, ...]] = Counter()
    for start in range({128: 60, 7: 200}[choices]):
        sampling = SamplingParameters(max_tokens=length, temperature=0.9, n=choices)
        request = Request(str(start), [0], sampling)
        counts.update(map(tuple, engine.generate([request])[str(start)]))
    assert_law(counts, (target / 0.9).softmax(-1), length)
    totals = pearl_of(engine).statistics
    assert totals.accepted > 0 and totals.refusals > 0


def test_seeded_answers_repeat_themselves() -> None:
    sampling = SamplingParameters(max_tokens=30, temperature=1.0, seed=5, n=2)
    requests = [Request(str(i), prompt, sampling) for i, prompt in enumerate(PROMPTS)]
    found = [outputs_of(pearl_on(small(), 3), requests) for _ in range(2)]
    assert found[0] == found[1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_keep_to_their_constraint(temperature: float) -> None:
    """The worker walks along the drafts in the state of the constraint, and always comes back."""
    constraint = OutputConstraint.regex("(ab|ba|true){2,40}!")
    compiled = compiler("llguidance").compile(constraint)
    ends = tuple(byte_level().convert_tokens_to_ids(["<|end|>"]))
    sampling = SamplingParameters(
        max_tokens=50, temperature=temperature, seed=2, constraint=constraint, n=3
    )
    request = Request("r", [1], sampling, constraint=compiled)
    target = markov(3, ROWS)

    def answers(engine: Engine) -> list[list[int]]:
        return engine.generate([request])["r"]

    engine = tables(Table(target), Table(target + markov(4, ROWS, 0.5)), 4, end_tokens=ends)
    found = answers(engine)
    for tokens in found:
        state = compiled.start()
        assert all(state.accept(token) for token in tokens)
    if temperature == 0.0:
        assert found == answers(plain(Table(target), end_tokens=ends))
    assert pearl_of(engine).statistics.accepted > 0
    assert_settled(engine)


# What the drafter computes


def test_laws_after_a_rollback_are_those_of_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was refused before: every law is that of the drafter on exactly these tokens."""
    grow, seen = Pearl.grow, []

    def spy(self: Pearl, trees: Sequence[Tree]) -> None:
        grow(self, trees)
        for tree in trees:
            text = tuple(tree.sequence.tokens)
            drafts = tree.without_laws()
            seen.extend(
                ((*text, *drafts.spelled(node)), law)
                for node, law in tree.laws.items()
                if node < tree.newest[0]
            )

    monkeypatch.setattr(Pearl, "grow", spy)
    engine = pearl_on(small(), 3)
    sampling = SamplingParameters(max_tokens=16, temperature=1.0, seed=0)
    engine.generate([Request(str(i), prompt, sampling) for i, prompt in enumerate(PROMPTS[:3])])
    assert pearl_of(engine).statistics.accepted > 0 and pearl_of(engine).statistics.refusals > 3

    alone = FusedRunner(rounded("LlamaConfig", {"num_hidden_layers": 1}), 512, 32)
    alone.allocate(4)
    for text, law in seen:
        sequence = TokenSequence(Request("a", text), 0, list(text), 1, pages=[0, 1, 2, 3])
        plan = StepPlan((Segment(sequence, 0, len(text)),), 32)
        expected = alone.execute(plan).logits[0].softmax(-1)
        torch.testing.assert_close(law, expected, rtol=1e-3, atol=1e-4)


def test_an_advanced_chain_is_the_chain_without_its_beginning() -> None:
    sequence = TokenSequence(Request("r", [1]), 0, [1], 9)
    tree = Tree(sequence, sequence, sequence.random, 1, 4)
    laws = torch.eye(6)
    for node in range(4):
        tree.add(laws[node + 1][None])
    assert tree.tokens == [1, 2, 3, 4]
    tree.advance(3)
    assert (tree.tokens, tree.parents, tree.counts, tree.newest) == ([4], [-1], [1], [0])
    assert tree.depth == 1 and tree.laws.keys() == {-1}
    torch.testing.assert_close(tree.laws[-1], laws[4])


def test_the_last_row_decides_on_a_node_without_row() -> None:
    draft = Proposal((4, 5), laws=torch.eye(6)[[4, 5, 0]])
    assert _match(draft, [4, 5]) == ([0, 1], None)
    assert _match(draft, [4, 3]) == ([0], 3)
    assert _match(draft, [4, 5, 2]) == ([0, 1], 2)
    rows = torch.eye(6)[[4, 5]]
    assert Rejection().judge(draft, rows, random.Random(0)) == ([0, 1], None)
    assert Rejection().judge(draft, torch.eye(6)[[4, 2]], random.Random(0)) == ([0], 2)


# Faults


class Faulty(Table):
    """Raises in one of its steps."""

    def __init__(self, logits: torch.Tensor, at: int) -> None:
        super().__init__(logits)
        self.at = at

    def execute(self, plan: StepPlan) -> StepResult:
        self.at -= 1
        if self.at == 0:
            raise RuntimeError("a defect")
        return super().execute(plan)


@pytest.mark.parametrize("at", [1, 2, 6, 11])
def test_a_drafter_that_fails_costs_no_token(at: int, caplog: pytest.LogCaptureFixture) -> None:
    """Its requests go on without drafts; later ones have them again."""
    table = markov(3, 6)
    engine = tables(Table(table), Faulty(table, at), 4)
    requests = [tiny.greedy([1, 2, 3], 40, str(i)) for i in range(3)]
    assert engine.generate(requests) == plain(Table(table)).generate(requests)
    assert [record.levelname for record in caplog.records].count("ERROR") == 1
    assert_settled(engine)
    before = len(pearl_of(engine).statistics.rounds)
    engine.generate([tiny.greedy([1, 2, 3], 40, "later")])
    assert len(pearl_of(engine).statistics.rounds) > before + 5


class Slow(Table):
    """Takes its time."""

    def __init__(self, logits: torch.Tensor, seconds: float) -> None:
        super().__init__(logits)
        self.seconds = seconds

    def execute(self, plan: StepPlan) -> StepResult:
        time.sleep(self.seconds)
        return super().execute(plan)


class Refusing(Table):
    """Fails for one request from some length on, whatever else is in the batch."""

    def execute(self, plan: StepPlan) -> StepResult:
        for segment in plan.segments:
            if segment.sequence.request.id == "bad" and segment.stop > 8:
                raise RuntimeError("a defect")
        return super().execute(plan)


def test_a_request_that_fails_while_it_is_drafted_for_leaves_nothing_behind() -> None:
    table = markov(3, 6)
    engine = tables(Refusing(table), Slow(table, 0.005), 3)
    requests = [tiny.greedy([1, 2, 3], 30, name) for name in ("good", "bad", "fine")]
    found: defaultdict[str, list[int]] = defaultdict(list)
    for request in requests:
        engine.add(request)
    for output in engine.run():
        found[output.request_id] += output.delta.token_ids
    expected = plain(Table(table)).generate(requests)
    assert found["good"] == expected["good"][0] and found["fine"] == expected["fine"][0]
    assert found["bad"] == expected["bad"][0][: len(found["bad"])] and len(found["bad"]) < 30
    assert_settled(engine)


def test_aborting_between_steps_leaves_nothing_behind() -> None:
    engine = pearl_on(twin())
    for i, prompt in enumerate(PROMPTS):
        engine.add(tiny.greedy(prompt, 40, str(i)))
    for i in range(len(PROMPTS)):
        engine.step()
        engine.step()
        engine.abort(str(i))
    assert not engine.has_work
    assert_settled(engine)


def test_a_step_that_never_ended_is_waited_for() -> None:
    """An interrupt in the target skips `finish`; what is under way then must not be drawn twice."""
    table = markov(3, 6)
    engine = tables(Table(table), Slow(table, 0.01), 3)
    request = tiny.greedy([1, 2, 3], 30, "r")
    expected = plain(Table(table)).generate([request])
    engine.add(request)
    tokens = [token for _ in range(3) for out in engine.step() for token in out.delta.token_ids]
    segments = [Segment(s, s.num_computed, len(s.tokens)) for s in engine.scheduler.decoding()]
    pearl_of(engine).propose([s.sequence for s in segments], [9] * len(segments))
    pearl_of(engine).begin(segments)
    tokens += [token for out in engine.run() for token in out.delta.token_ids]
    assert [tokens] == expected["r"]
    assert_settled(engine)


# Time


class Meeting(Table):
    """Once two of them are at it, each waits for the other before it answers."""

    def __init__(self, logits: torch.Tensor, meet: Callable[[StepPlan], None]) -> None:
        super().__init__(logits)
        self.meet = meet

    def execute(self, plan: StepPlan) -> StepResult:
        self.meet(plan)
        return super().execute(plan)


def test_both_models_compute_at_the_same_time() -> None:
    """If one came after the other each step would wait for the barrier until that breaks."""
    table = markov(3, 6)
    barrier = threading.Barrier(2, timeout=20)
    met = []

    def meet(plan: StepPlan) -> None:
        if plan.segments[0].sequence.num_generated or threading.current_thread() is not main:
            met.append(threading.current_thread())
            barrier.wait()

    main = threading.current_thread()
    engine = tables(Meeting(table, meet), Meeting(table, meet), 1)
    request = tiny.greedy([1, 2, 3], 11, "r")
    # The last token is not drafted for: nobody would come to that meeting.
    engine.add(request)
    tokens: list[int] = []
    while len(tokens) < 10:
        tokens += [token for out in engine.step() for token in out.delta.token_ids]
    assert tokens == plain(Table(table)).generate([request])["r"][0][:10]
    assert Counter(thread is main for thread in met) == {True: 9, False: 9}
    engine.abort("r")
    assert_settled(engine)


def test_a_round_takes_no_longer_than_the_slower_model() -> None:
    table = markov(3, 6)
    engine = tables(Slow(table, 0.03), Slow(table, 0.01), 3)
    engine.generate([tiny.greedy([1, 2, 3], 30)])
    rounds = list(pearl_of(engine).statistics.rounds)
    both = sum(each.draft_seconds + 0.03 for each in rounds)
    assert sum(each.seconds for each in rounds) < 0.8 * both


class ThreadClock:
    """Every thread has its own time, which its model moves."""

    def __init__(self) -> None:
        self.now: defaultdict[int, float] = defaultdict(float)

    def __call__(self) -> float:
        return self.now[threading.get_ident()]


class Timed(Table):
    """Takes its time on a clock of tests."""

    def __init__(self, logits: torch.Tensor, clock: ThreadClock, seconds: float) -> None:
        super().__init__(logits)
        self.clock, self.seconds = clock, seconds

    def execute(self, plan: StepPlan) -> StepResult:
        self.clock.now[threading.get_ident()] += self.seconds
        return super().execute(plan)


def test_as_many_tokens_are_drafted_as_fit_into_a_step() -> None:
    table, clock = markov(3, 6), ThreadClock()
    target, draft = Timed(table, clock, 1.0), Timed(table, clock, 0.2)
    engine = tables(target, draft, None, clock=clock)
    pearl = pearl_of(engine)
    engine.generate([tiny.greedy([1, 2, 3], 100)])
    assert pearl.window == 5
    draft.seconds = 0.1  # followed slowly
    engine.generate([tiny.greedy([1, 2, 3], 50)])
    assert 5 < pearl.window < 10
    engine.generate([tiny.greedy([1, 2, 3], 200, str(i)) for i in range(4)])
    assert pearl.window in (9, 10)
    draft.seconds = 0.001
    engine.generate([tiny.greedy([1, 2, 3], 240, str(i)) for i in range(2)])
    assert pearl.window == LONGEST_WINDOW
    draft.seconds = 7.0
    engine.generate([tiny.greedy([1, 2, 3], 240, str(i)) for i in range(2)])
    assert pearl.window == 1


@pytest.mark.parametrize(
    ("threads", "cores", "expected"),
    [
        (1, 1, (1, 1)),
        (1, 2, (1, 1)),
        (2, 2, (1, 1)),
        (3, 4, (3, 1)),
        (8, 8, (4, 4)),
        (5, 5, (3, 2)),
    ],
)
def test_cores_are_shared(threads: int, cores: int, expected: tuple[int, int]) -> None:
    assert share_threads(threads, cores) == expected


def test_closing_gives_the_threads_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        table = markov(3, 6)
        engine = tables(Table(table), Table(table), 3)
        engine.generate([tiny.greedy([1, 2, 3], 10)])
        shared = torch.get_num_threads()
        assert 1 <= shared <= 4
        worker = pearl_of(engine)._worker
        assert worker is not None
        own = worker.submit(torch.get_num_threads).result()
        assert own >= 1 and torch.get_num_threads() == shared
        pearl_of(engine).close()
        assert torch.get_num_threads() == 4
        engine.generate([tiny.greedy([1, 2, 3], 10)])  # starts it again
        pearl_of(engine).close()
    finally:
        torch.set_num_threads(before)


# Bad input


def test_what_cannot_draft_is_refused_at_the_start() -> None:
    with pytest.raises(ConfigurationError, match="speculation=pearl needs draft_model"):
        pearl_on(None)
    with pytest.raises(ConfigurationError, match="one draft a sequence, not 2"):
        pearl_on(twin(), drafts=2)
    with pytest.raises(ConfigurationError, match="draft_tokens is 0"):
        pearl_on(twin(), 0)
    with pytest.raises(VocabularyMismatch, match="4 tokens"):
        pearl_on(Table(markov(0, 4)))
