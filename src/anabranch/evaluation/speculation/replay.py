"""Replays traffic whose drafts were judged before, under any controller, in predicted time.

Whether a drafted token is accepted does not depend on how many are drafted or on when, so that one
recording of real judgements serves every controller, and what a step takes comes from a cost model:
a busy machine decides nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np

from anabranch.planning import CostModel
from anabranch.serving.speculation.controller import DraftCost, Load, SpeculationController

TOKEN_BUDGET = 256
"""Of a step: decoding sequences take one each, prompts what is left; drafts come on top."""


@dataclass(frozen=True)
class JudgedRequest:
    """A request whose output is known.

    ``accepted[t]`` says whether a draft of output token t, with all before it right, is accepted.
    ``drafted[t]`` is the length of the draft that a lookup finds there; None for drafting models,
    which draft as much as they are told to.
    """

    seconds: float
    """When it arrives."""
    prompt_tokens: int
    accepted: np.ndarray
    drafted: np.ndarray | None = None
    kind: Hashable = None

    @property
    def output_tokens(self) -> int:
        """All of them come out, whoever drafts."""
        return len(self.accepted)


@dataclass
class Replay:
    """What happened."""

    latencies: np.ndarray
    """[requests] seconds from the arrival to the last token"""
    seconds: float
    """When the last request was done."""
    steps: int
    lengths: list[float] = field(default_factory=list)
    """Mean drafted tokens of a decoding sequence, in each step that had any."""

    @property
    def latency(self) -> float:
        """Mean, in seconds."""
        return float(self.latencies.mean())


@dataclass
class _Running:
    request: JudgedRequest
    index: int
    prefilled: int = 0
    generated: int = 0

    @property
    def context(self) -> int:
        return self.request.prompt_tokens + self.generated

    def room(self, k_max: int) -> int:
        """Most tokens that can be drafted: the last one is never drafted."""
        left = self.request.output_tokens - self.generated - 1
        if self.request.drafted is not None and left > 0:
            return min(left, int(self.request.drafted[self.generated]))
        return min(left, k_max)

    def judge(self, length: int) -> tuple[int, bool]:
        """Accepted tokens of a draft, and whether one was refused."""
        flags = self.request.accepted[self.generated : self.generated + length]
        accepted = length if flags.all() else int(flags.argmin())
        return accepted, accepted < length


def replay_judged(
    requests: Sequence[JudgedRequest],
    controller: SpeculationController,
    seconds_of: Callable[[int, int, float], float],
    draft_cost: DraftCost | None,
    learned: CostModel | None = None,
    token_budget: int = TOKEN_BUDGET,
) -> Replay:
    """Serve requests, sorted by arrival, first come first served.

    ``seconds_of(tokens, context, drafting)`` is how long a step really takes, with ``drafting``
    the seconds that ``draft_cost`` predicts. ``learned`` is the cost model that the controller
    reads, which then observes each step as an engine's does.
    """
    upcoming = deque(_Running(request, index) for index, request in enumerate(requests))
    prefilling: deque[_Running] = deque()
    decoding: list[_Running] = []
    finished = np.zeros(len(requests))
    result = Replay(finished, 0.0, 0)
    now = 0.0
    while upcoming or prefilling or decoding:
        if not prefilling and not decoding:
            now = max(now, upcoming[0].request.seconds)
        while upcoming and upcoming[0].request.seconds <= now:
            prefilling.append(upcoming.popleft())

        prompts = _prefill(prefilling, token_budget - len(decoding))
        tokens = sum(count for _, count in prompts)
        context = sum(running.prefilled for running, _ in prompts)
        lengths = _lengths(controller, decoding, tokens)
        drafted, drafting = sum(lengths), 0.0
        if draft_cost is not None and drafted:
            some = [r.context for r, k in zip(decoding, lengths, strict=True) if k]
            drafting = draft_cost(len(some), sum(some), max(lengths))
        tokens += len(decoding) + drafted
        context += sum(running.context for running in decoding) + drafted
        took = seconds_of(tokens, context, drafting)
        now += took
        result.steps += 1
        if learned is not None:
            learned.observe(tokens, context, took - drafting)

        for running, length in zip(decoding, lengths, strict=True):
            accepted, refused = running.judge(length)
            if length:
                controller.observe(running.request.kind, accepted, refused)
            running.generated += accepted + 1
        if decoding:
            controller.record(took)
            result.lengths.append(drafted / len(decoding))
        for running, _ in prompts:
            if running.prefilled == running.request.prompt_tokens:
                running.generated = 1
                decoding.append(running)
                prefilling.remove(running)
        for running in decoding:
            if running.generated >= running.request.output_tokens:
                finished[running.index] = now - running.request.seconds
        decoding = [r for r in decoding if r.generated < r.request.output_tokens]
    result.seconds = now
    return result


def _prefill(waiting: Sequence[_Running], budget: int) -> list[tuple[_Running, int]]:
    """Give prompts, in order, as many tokens as are left."""
    given = []
    for running in waiting:
        count = min(budget, running.request.prompt_tokens - running.prefilled)
        if count <= 0:
            break
        running.prefilled += count
        budget -= count
        given.append((running, count))
    return given


def _lengths(
    controller: SpeculationController, decoding: Sequence[_Running], prefill_tokens: int
) -> list[int]:
    if not decoding:
        return []
    rooms = [running.room(controller.longest) for running in decoding]
    kinds = [running.request.kind for running in decoding]
    load = Load(prefill_tokens, [running.context for running in decoding])
    looked_up = decoding[0].request.drafted is not None
    lengths = controller.lengths(kinds, load, rooms if looked_up else None)
    return list(map(min, lengths, rooms))
