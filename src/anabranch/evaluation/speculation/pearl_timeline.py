"""When drafts would have been ready: schedules of two models replayed on measured times.

What is accepted does not depend on the schedule. At every position of a text that the target wrote
a draft either stands or is refused, whoever drafts it and when: with greedy decoding it stands if
the drafter's most likely token is the text's, and with drawing it stands with probability
min(1, q(x) / p(x)), because that is what rejection sampling implies for an emitted token x. So one
pass of both models over a text fixes everything, and every schedule is counted on the same text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CallTimes:
    """Seconds of one call of each model. ``target[r - 1]`` is for r rows."""

    target: Sequence[float]
    draft: float

    def verify(self, rows: int) -> float:
        """Seconds of the target on so many rows, going on in a line beyond what was measured."""
        measured = len(self.target)
        if rows <= measured:
            return self.target[rows - 1]
        slope = (self.target[-1] - self.target[0]) / max(1, measured - 1)
        return self.target[-1] + slope * (rows - measured)

    def window(self, most: int = 16) -> int:
        """PEARL's window: the drafting steps that fit beside a verification of as many tokens."""
        for size in range(1, most):
            if round(self.verify(size + 1) / self.draft) <= size:
                return size
        return most


@dataclass(frozen=True)
class Timeline:
    """How one text came about."""

    tokens: int
    seconds: float
    target_calls: int
    draft_calls: int
    accepted: int
    drafts: int
    """How often drafting began anew behind what the target had decided."""

    @property
    def accepted_length(self) -> float:
        """Mean drafted tokens that were accepted before drafting had to begin anew."""
        return self.accepted / max(1, self.drafts)


def together(timelines: Sequence[Timeline]) -> Timeline:
    """Several texts, one after the other."""
    return Timeline(
        sum(t.tokens for t in timelines),
        sum(t.seconds for t in timelines),
        sum(t.target_calls for t in timelines),
        sum(t.draft_calls for t in timelines),
        sum(t.accepted for t in timelines),
        sum(t.drafts for t in timelines),
    )


def standing(text: Sequence[int], target: Tensor, draft: Tensor, seed: int | None) -> list[bool]:
    """At which positions of a text a draft stands.

    ``target`` and ``draft [positions, vocabulary]`` are logits of what comes at each position of
    ``text``. ``seed`` None is greedy decoding; otherwise a text that was drawn at temperature 1.
    """
    tokens = torch.tensor(text)
    if seed is None:
        return (draft.argmax(-1) == tokens).tolist()
    ratio = (draft.log_softmax(-1) - target.log_softmax(-1)).gather(1, tokens[:, None])[:, 0]
    uniform = torch.rand(len(tokens), generator=torch.Generator().manual_seed(seed))
    return (uniform < ratio.exp()).tolist()


def autoregressive(stands: Sequence[bool], times: CallTimes) -> Timeline:
    """One row after the other."""
    count = len(stands)
    return Timeline(count, count * times.verify(1), count, 0, 0, 0)


def vanilla(stands: Sequence[bool], times: CallTimes, window: int) -> Timeline:
    """Draft ``window`` tokens, then verify them, then draft again (Leviathan et al. 2023).

    The last row adds a token to a window that stands.
    """
    done, seconds, calls, drafted, accepted, drafts = 0, 0.0, 0, 0, 0, 0
    while done < len(stands):
        size = min(window, len(stands) - done - 1)
        run = _run(stands, done, size)
        seconds += size * times.draft + times.verify(size + 1)
        done += run + 1
        calls, drafted, accepted, drafts = calls + 1, drafted + size, accepted + run, drafts + 1
    return Timeline(len(stands), seconds, calls, drafted, accepted, drafts)


def pearl(
    stands: Sequence[bool],
    times: CallTimes,
    window: int,
    pre_verify: bool = True,
    post_verify: bool = True,
) -> Timeline:
    """Both at the same time: a round takes as long as the slower of the two.

    Without ``pre_verify`` the target computes drafted tokens only: it waits for the first window,
    and does not look at the beginning of the next one. Without ``post_verify`` nothing is drafted
    while a window is verified, and so its last row adds a token.
    """
    done, ahead = 0, 0  # tokens that are decided; drafted ones that the target has not computed
    seconds, calls, drafted, accepted, drafts = 0.0, 0, 0, 0, 1
    while done < len(stands):
        left = len(stands) - done
        if not ahead and not pre_verify and left > 1:
            ahead = min(window, left)
            drafted += ahead
            seconds += ahead * times.draft
        drafting = left > 1 and (post_verify or not ahead)
        nodes = min(ahead, left - 1) if pre_verify else ahead
        depth = max(ahead, min(nodes + window, left)) if drafting else ahead
        # Of what is drafted meanwhile the last row can test the first token.
        tested = min(nodes + 1, depth) if pre_verify and drafting else nodes
        rows = nodes + 1 if pre_verify else max(1, nodes)
        run = _run(stands, done, tested)
        refused = run < tested
        seconds += max(times.verify(rows), (depth - ahead) * times.draft)
        calls, drafted, accepted = calls + 1, drafted + depth - ahead, accepted + run
        added = refused or tested < rows  # the row behind what stands says what follows
        done += run + added
        ahead = 0 if added else depth - run
        drafts += added and done < len(stands)
    return Timeline(len(stands), seconds, calls, drafted, accepted, drafts)


def _run(stands: Sequence[bool], start: int, most: int) -> int:
    run = 0
    while run < most and stands[start + run]:
        run += 1
    return run
