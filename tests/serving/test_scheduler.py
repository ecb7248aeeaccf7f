"""The scheduler with everything real but the model."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import accumulate

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anabranch.errors import ConfigurationError
from anabranch.serving import KVCacheManager, Policy, Segment, Sequence, TokenBudgetScheduler
from anabranch.serving.batch import StepPlan
from anabranch.serving.policies.orca import Orca
from anabranch.serving.policies.prefill_first import PrefillFirst
from anabranch.serving.policies.splitfuse import SplitFuse
from anabranch.serving.sources import even_chunk
from tests.serving.helpers import make_sequence

POLICIES = [SplitFuse, PrefillFirst, Orca]
BUDGETS = [1, 2, 7, 64, 10**9]


@dataclass(frozen=True)
class Job:
    """A request of the workload; it generates ``lengths[i]`` tokens in its i-th choice."""

    arrival: int
    prompt: list[int]
    lengths: list[int]
    pooling: bool
    abort: int | None


@dataclass(frozen=True)
class Workload:
    jobs: list[Job]
    page_size: int
    num_pages: int
    max_sequences: int

    @property
    def tokens(self) -> int:
        return sum(len(job.prompt) + length for job in self.jobs for length in job.lengths)


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    lengths = st.lists(st.integers(1, 15), min_size=1, max_size=3)
    job = st.builds(
        Job,
        arrival=st.integers(0, 25),
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=30),
        lengths=st.one_of(lengths.map(lambda drawn: drawn[:1]), lengths),
        pooling=st.sampled_from([False] * 5 + [True]),
        abort=st.one_of(st.none(), st.none(), st.integers(0, 60)),
    )
    jobs = draw(st.lists(job, min_size=1, max_size=9))
    page_size = draw(st.sampled_from([1, 2, 4, 16]))
    largest = max(len(job.prompt) + max(job.lengths) for job in jobs)
    just_fits = -(-largest // page_size)
    return Workload(
        sorted(jobs, key=lambda job: job.arrival),
        page_size,
        just_fits + draw(st.integers(0, 2 * just_fits)),
        draw(st.integers(1, 6)),
    )


def fingerprints(tokens: list[int]) -> list[int]:
    """What a token's keys and values depend on: itself and all tokens before it."""
    chain = accumulate(tokens, lambda previous, token: hash((previous, token)), initial=0)
    return list(chain)[1:]


class Simulation:
    """Drives a scheduler as the engine does and checks each of its steps."""

    def __init__(self, policy: Policy, budget: int, workload: Workload) -> None:
        self.cache = KVCacheManager(workload.num_pages, workload.page_size)
        self.scheduler = TokenBudgetScheduler(self.cache, policy, budget, workload.max_sequences)
        self.workload = workload
        self.content = [[0] * workload.page_size for _ in range(workload.num_pages)]
        self.choices: dict[int, list[Sequence]] = {}
        self.arrived: list[Sequence] = []
        self.begun: set[Sequence] = set()
        self.unfinished: dict[Sequence, int] = {}

    def run(self) -> None:
        clock, steps = 0, 0
        jobs = self.workload.jobs
        while True:
            for number, job in enumerate(jobs):
                if job.arrival == clock:
                    self.arrive(number, job)
                if job.abort == clock and number in self.choices:
                    self.abort(number)
            clock += 1
            if self.scheduler.has_work:
                self.step()
                steps += 1
                # Every step computes something; preemption may make it compute that again.
                assert steps <= 3 * self.workload.tokens + 10, "no progress"
            elif len(self.choices) == len(jobs):
                break
        assert not self.unfinished
        assert self.scheduler.schedule() is None
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0
        assert self.cache.num_available == self.workload.num_pages

    def arrive(self, number: int, job: Job) -> None:
        parent, *siblings = self.choices[number] = [
            make_sequence(job.prompt, index=i, pooling=job.pooling, name=str(number))
            for i in range(1 if job.pooling else len(job.lengths))
        ]
        parent.siblings = list(siblings)
        self.unfinished.update(zip(self.choices[number], job.lengths, strict=False))
        self.arrived.append(parent)
        self.scheduler.add(parent)

    def abort(self, number: int) -> None:
        for sequence in self.choices[number]:
            self.scheduler.remove(sequence)
            self.unfinished.pop(sequence, None)

    def step(self) -> None:
        budget = self.scheduler.token_budget
        tokens = {s: list(s.tokens) for s in self.unfinished}
        running, preemptions = self.running(), self.scheduler.num_preemptions
        ready = {s for s in running if s.num_pending == 1}
        plan = self.scheduler.schedule()
        assert plan is not None and plan.segments
        self.cache.check_integrity()
        assert {s: s.tokens for s in self.unfinished} == tokens, "a token was lost"
        assert self.scheduler.num_running <= self.workload.max_sequences
        self.check_preemption(running, self.scheduler.num_preemptions - preemptions)
        self.check_first_come_first_served()
        self.check_segments(plan)
        assert plan.num_tokens <= budget or self.scheduler.policy.whole_prompts
        if self.scheduler.num_preemptions == preemptions:
            self.check_budget(plan, ready)
        self.execute(plan)
        self.sample(plan)
        self.cache.check_integrity()

    def check_preemption(self, running: list[Sequence], preemptions: int) -> None:
        """Only the last admitted are preempted, and they are next in the queue."""
        now = self.running()
        kept = [s for s in running if s in now]
        assert kept == running[: len(kept)]
        lost = running[len(kept) :]
        assert len(lost) <= preemptions
        assert self.waiting()[: len(lost)] == lost

    def check_first_come_first_served(self) -> None:
        self.begun.update(self.running())
        alive = [s for s in self.arrived if s in self.unfinished]
        have_begun = [s in self.begun for s in alive]
        assert have_begun == sorted(have_begun, reverse=True), "somebody was overtaken"

    def check_segments(self, plan: StepPlan) -> None:
        """Each continues its sequence where it stands, and has the pages for it."""
        assert len({segment.sequence for segment in plan.segments}) == len(plan.segments)
        for segment in plan.segments:
            sequence = segment.sequence
            assert sequence in self.unfinished and sequence in self.running()
            assert segment.start == sequence.num_computed < segment.stop <= len(sequence.tokens)
            assert segment.stop <= len(sequence.pages) * self.cache.page_size
            whole = segment.stop == len(sequence.tokens)
            assert whole or not self.scheduler.policy.whole_prompts

    def check_budget(self, plan: StepPlan, ready: set[Sequence]) -> None:
        budget = self.scheduler.token_budget
        decodes = [s for s in plan.segments if s.sequence in ready and s.length == 1]
        prompts = [s for s in plan.segments if s not in decodes]
        assert len(decodes) <= budget
        if isinstance(self.scheduler.policy, SplitFuse):
            assert all(s.stop == len(s.sequence.tokens) for s in prompts[:-1]), "cut too early"
            if plan.num_tokens < budget:
                self.check_why_not_full(plan, len(decodes))
        else:
            rest = budget
            if isinstance(self.scheduler.policy, Orca):
                rest -= len(decodes)
            elif any(s.length > 1 for s in prompts):
                assert not decodes, "prefill and decode are mixed"
            assert sum(s.length for s in prompts) <= rest or len(prompts) == 1

    def check_why_not_full(self, plan: StepPlan, decodes: int) -> None:
        """A step below the budget is one in which nobody could have used more of it."""
        taken = {segment.sequence: segment for segment in plan.segments}
        for sequence in self.running():
            if sequence not in taken:
                assert sequence.num_pending == 1 and not self.cache.num_available
                assert sequence.num_computed == len(sequence.pages) * self.cache.page_size
        waiting = self.waiting()
        if waiting and self.scheduler.num_running < self.workload.max_sequences:
            candidate = make_sequence(waiting[0].tokens, pooling=waiting[0].request.pooling)
            assert not copy.deepcopy(self.cache).admit(candidate), "a prompt could be admitted"
        cut = [s for s in plan.segments if s.stop < len(s.sequence.tokens)]
        if cut:  # the even split: one prompt, and nobody behind it to fill the gap
            assert len(plan.segments) == decodes + 1 and not waiting
            pending = cut[0].sequence.num_pending
            assert cut[0].length == even_chunk(pending, self.scheduler.token_budget - decodes)

    def execute(self, plan: StepPlan) -> None:
        """Write what each token depends on, after checking that all before it is in place."""
        copied = [(target, list(self.content[source])) for source, target in plan.page_copies]
        for target, slots in copied:
            self.content[target] = slots
        size = self.cache.page_size
        for segment in plan.segments:
            pages = segment.sequence.pages
            expected = fingerprints(segment.sequence.tokens)
            seen = [self.content[pages[i // size]][i % size] for i in range(segment.start)]
            assert seen == expected[: segment.start], "the cache holds something else"
        for segment in plan.segments:
            pages = segment.sequence.pages
            expected = fingerprints(segment.sequence.tokens)
            for i in range(segment.start, segment.stop):
                self.content[pages[i // size]][i % size] = expected[i]
        for segment in plan.segments:
            self.scheduler.computed(segment)
            assert segment.sequence.num_computed == segment.stop

    def sample(self, plan: StepPlan) -> None:
        chosen: list[Sequence] = []
        for segment in plan.segments:
            if segment.num_logits:
                chosen += self.fork(segment)
        for sequence in chosen:
            sequence.tokens.append(hash((sequence.request.id, sequence.index, len(chosen))) % 2)
        for sequence in [*chosen, *(s.sequence for s in plan.segments)]:
            over = sequence.num_generated == self.unfinished.get(sequence)
            if over or (sequence.request.pooling and not sequence.num_pending):
                self.scheduler.remove(sequence)
                self.unfinished.pop(sequence, None)

    def fork(self, segment: Segment) -> list[Sequence]:
        """The choices of a request that can be sampled; the late ones are next in the queue."""
        parent, siblings = segment.sequence, segment.sequence.siblings
        forked = self.scheduler.fork(parent)
        for child in forked:
            assert child.tokens == parent.tokens and child.num_pending == 0
        late = [child for child in siblings if child not in forked]
        assert self.waiting()[: len(late)] == late
        assert parent.siblings == []
        return [parent, *forked]

    def running(self) -> list[Sequence]:
        return list(self.scheduler.sequences())[: self.scheduler.num_running]

    def waiting(self) -> list[Sequence]:
        return list(self.scheduler.sequences())[self.scheduler.num_running :]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("budget", BUDGETS)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(workload=workloads())
def test_every_workload_is_computed_in_order_and_to_its_end(
    policy: type[Policy], budget: int, workload: Workload
) -> None:
    Simulation(policy(), budget, workload).run()


@pytest.mark.parametrize("policy", POLICIES)
def test_preemption_happens_and_loses_nothing(policy: type[Policy]) -> None:
    jobs = [Job(0, [i % 2] * 7, [25], pooling=False, abort=None) for i in range(5)]
    simulation = Simulation(policy(), 16, Workload(jobs, 2, 20, 5))
    simulation.run()
    assert simulation.scheduler.num_preemptions > 0


@pytest.mark.parametrize("budget", [1, 2, 3, 5])
def test_a_small_budget_serves_all_streams_in_turn(budget: int) -> None:
    streams = 5
    cache = KVCacheManager(100, 4)
    scheduler = TokenBudgetScheduler(cache, SplitFuse(), budget, streams)
    parent = make_sequence([1])
    children = [make_sequence([1], index=i) for i in range(1, streams)]
    parent.siblings = list(children)
    scheduler.add(parent)
    served = dict.fromkeys([parent, *children], 0)
    for step in range(60):
        plan = scheduler.schedule()
        assert plan is not None
        chosen = []
        for segment in plan.segments:
            scheduler.computed(segment)
            chosen += [segment.sequence, *scheduler.fork(segment.sequence)]
        for sequence in chosen:
            sequence.tokens.append(0)
            served[sequence] += step > 0
        assert step == 0 or len(chosen) == budget
        assert max(served.values()) - min(served.values()) <= 1


@pytest.mark.parametrize("policy", POLICIES)
def test_a_stream_goes_on_while_prompts_keep_arriving(policy: type[Policy]) -> None:
    """No stall in splitfuse and Orca; the baseline that prefills first stalls, as it should."""
    scheduler = TokenBudgetScheduler(KVCacheManager(1000, 4), policy(), 8, 100)
    stream = make_sequence([0])
    scheduler.add(stream)
    gaps = 0
    for step in range(30):
        if step:
            scheduler.add(make_sequence([step] * 8))
        plan = scheduler.schedule()
        assert plan is not None
        for segment in plan.segments:
            scheduler.computed(segment)
            if segment.num_logits:
                segment.sequence.tokens.append(1)
                if segment.sequence is not stream:
                    scheduler.remove(segment.sequence)
        gaps += stream not in [segment.sequence for segment in plan.segments]
    assert gaps == (29 if policy is PrefillFirst else 0)


def test_pieces_of_a_lonely_prompt_have_equal_size() -> None:
    scheduler = TokenBudgetScheduler(KVCacheManager(10, 16), SplitFuse(), 64, 4)
    scheduler.add(make_sequence(range(100)))
    sizes = []
    for _ in range(2):
        plan = scheduler.schedule()
        assert plan is not None
        sizes.append(plan.num_tokens)
        scheduler.computed(plan.segments[0])
    assert sizes == [50, 50]


def test_pieces_fill_the_budget_while_another_prompt_waits() -> None:
    scheduler = TokenBudgetScheduler(KVCacheManager(20, 16), SplitFuse(), 64, 4)
    scheduler.add(make_sequence(range(100)))
    scheduler.add(make_sequence(range(100, 200)))
    spans = []
    for _ in range(3):
        plan = scheduler.schedule()
        assert plan is not None
        spans.append([(s.sequence.tokens[s.start], s.length) for s in plan.segments])
        for segment in plan.segments:
            scheduler.computed(segment)
    # Once the first prompt is done (nobody samples here), the other one is split evenly.
    assert spans == [[(0, 64)], [(64, 36), (100, 28)], [(128, 36)]]


@given(pending=st.integers(1, 10_000), budget=st.integers(1, 3000))
def test_even_chunks_are_few_and_of_equal_size(pending: int, budget: int) -> None:
    sizes = []
    left = pending
    while left:
        sizes.append(even_chunk(left, budget))
        left -= sizes[-1]
    assert sum(sizes) == pending
    assert len(sizes) == -(-pending // budget)
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) > 0 and max(sizes) <= budget


@pytest.mark.parametrize(("budget", "places"), [(0, 1), (-3, 1), (1, 0)])
def test_limits_below_one_are_refused(budget: int, places: int) -> None:
    with pytest.raises(ConfigurationError, match="must be at least 1, not"):
        TokenBudgetScheduler(KVCacheManager(1, 4), SplitFuse(), budget, places)


def test_an_idle_scheduler_has_no_step() -> None:
    scheduler = TokenBudgetScheduler(KVCacheManager(1, 4), SplitFuse(), 4, 4)
    assert not scheduler.has_work and scheduler.schedule() is None
