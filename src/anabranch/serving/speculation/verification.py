"""Which drafted tokens stay, and what follows them: the target's law decides, always.

Chosen drafts (looked up in the context, forced by a grammar, or of a greedy request) need no law of
their own: at every row the target draws the token that it would have drawn without a draft, and a
draft stays as long as it says the same. That accepts a token x with the target's probability p(x),
the most that any lossless rule can for a chosen token, and a seeded request gives the same tokens
with and without drafts.

Drafts that were drawn from a law of their own are judged by a :class:`Verifier`, which accepts more
of them than comparing two draws would.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from anabranch.serving import sampling
from anabranch.serving.adjustment import Row, adjust
from anabranch.serving.sampling import Sampled, described, distributions, finite, is_greedy
from anabranch.serving.sequence import Sequence
from anabranch.serving.speculation.proposal import Proposal
from anabranch.serving.speculation.spectr import draw, select


class Judgement(NamedTuple):
    """What a verifier decided about one proposal."""

    nodes: list[int]
    """Accepted nodes, a path."""
    token: int | None
    """What follows them instead of the other drafts; None behind a node that has no row."""


class Verifier(ABC):
    """Judges drawn drafts so that what is emitted has the target's law. A plug-in."""

    name: str

    @abstractmethod
    def judge(self, proposal: Proposal, targets: Tensor, random: random.Random) -> Judgement:
        """Accept a path. ``targets [rows, vocabulary]`` are the target's laws.

        Row 0 is for what follows the sequence, row 1 + i for what follows node i. The last nodes
        may have no row: the judgement ends behind them.
        """


@dataclass(frozen=True, eq=False)
class Candidate:
    """A sequence that chooses its next tokens, and the rows of logits that it may choose from.

    ``row`` is the row after the sequence; those of ``num_rows - 1`` nodes of the draft follow it.
    """

    sequence: Sequence
    row: int
    draft: Proposal | None = None
    num_rows: int = 1
    instead: Tensor | None = None
    """Adjusted logits ``[vocabulary]`` to draw from instead of those of the row."""


@dataclass(frozen=True)
class Verdict:
    """What one sequence emits: the tokens of the accepted nodes, and mostly one more."""

    nodes: list[int]
    tokens: list[Sampled]


def verify(
    logits: Tensor, candidates: SequenceOf[Candidate], verifier: Verifier
) -> list[Verdict | None]:
    """Choose the next tokens of every candidate; None where a row that was read is not finite."""
    if not candidates:
        return []
    rows: list[Row] = []
    index: list[int] = []
    first: list[int] = []
    for candidate in candidates:
        first.append(len(rows))
        rows.append(Row(candidate.sequence))
        for node in range(candidate.num_rows - 1):
            assert candidate.draft is not None
            rows.append(Row(candidate.sequence, candidate.draft.spelled(node)))
        index += range(candidate.row, candidate.row + candidate.num_rows)
    if index != list(range(len(logits))):
        logits = logits[index]
    adjusted = adjust(logits, rows)
    replaced = [(c.instead, row) for c, row in zip(candidates, first, strict=True)]
    if any(instead is not None for instead, _ in replaced):
        adjusted = adjusted.clone()
        for instead, row in replaced:
            if instead is not None:
                adjusted[row] = instead
    good = finite(logits, adjusted)
    tokens = sampling.draw(adjusted, rows)
    targets = _targets(adjusted, rows, candidates, first)

    verdicts: list[Verdict | None] = []
    for candidate, start in zip(candidates, first, strict=True):
        mine = slice(start, start + candidate.num_rows)
        draft = candidate.draft
        if draft is None or candidate not in targets:
            judgement = _match(draft, tokens[mine])
        elif all(good[mine]):
            random = candidate.sequence.random
            judgement = verifier.judge(draft, targets[candidate], random)
        else:
            judgement = Judgement([], None)
        read = [start, *(start + 1 + node for node in judgement.nodes)][: candidate.num_rows]
        chosen = [draft.tokens[node] for node in judgement.nodes] if draft else []
        if judgement.token is not None:
            chosen.append(judgement.token)
        if not chosen or not all(good[row] for row in read):
            verdicts.append(None)
            continue
        sampled = [
            described(logits, row, rows[row], token)
            for row, token in zip(read, chosen, strict=True)
        ]
        verdicts.append(Verdict(judgement.nodes, sampled))
    return verdicts


def _targets(
    adjusted: Tensor,
    rows: list[Row],
    candidates: SequenceOf[Candidate],
    first: list[int],
) -> dict[Candidate, Tensor]:
    """The target's laws for those candidates whose drafts were drawn from laws."""
    drawn = [
        (candidate, range(start, start + candidate.num_rows))
        for candidate, start in zip(candidates, first, strict=True)
        if candidate.draft is not None
        and candidate.draft.laws is not None
        and not is_greedy(candidate.sequence.request.sampling)
    ]
    if not drawn:
        return {}
    index = [row for _, mine in drawn for row in mine]
    laws = distributions(adjusted[index], [rows[row] for row in index])
    parts = laws.split([len(mine) for _, mine in drawn])
    return dict(zip([candidate for candidate, _ in drawn], parts, strict=True))


def _match(draft: Proposal | None, tokens: list[int]) -> Judgement:
    """Follow the drawn tokens through the draft. ``tokens``: of the row before it, and of nodes."""
    nodes: list[int] = []
    at, token = 0, tokens[0]
    while draft is not None and token in draft.children[at]:
        node = draft.children[at][token]
        nodes.append(node)
        if node + 1 >= len(tokens):
            return Judgement(nodes, None)  # it has no row
        at, token = node + 1, tokens[node + 1]
    return Judgement(nodes, token)


class Rejection(Verifier):
    """Speculative sampling of a chain (Leviathan et al. 2023; Chen et al. 2023).

    Token x stays with probability min(1, p(x) / q(x)); the first that does not is replaced by a
    draw from what p has more than q.
    """

    name = "rejection"

    def judge(self, proposal: Proposal, targets: Tensor, random: random.Random) -> Judgement:
        """Token by token."""
        if proposal.parents is not None:
            raise ValueError("rejection sampling judges chains; use `kseq` for trees of drafts")
        assert proposal.laws is not None
        for node, token in enumerate(proposal.tokens):
            target, law = targets[node].double(), proposal.laws[node].double()
            if random.random() * float(law[token]) < float(target[token]):
                continue
            left = (target - law).clamp(min=0)
            # Rounding may leave nothing where both laws are the same.
            return Judgement(
                list(range(node)), draw(left if left.any() else target, random.random())
            )
        nodes = list(range(len(proposal)))
        if len(targets) <= len(proposal):
            return Judgement(nodes, None)
        return Judgement(nodes, draw(targets[-1], random.random()))


class KSequential(Verifier):
    """SpecTr's selection among independent drafts (Sun et al. 2023), for trees and for chains."""

    name = "kseq"

    def judge(self, proposal: Proposal, targets: Tensor, random: random.Random) -> Judgement:
        """Walk down the tree; every node must have a row."""
        assert proposal.laws is not None
        selection = select(proposal, proposal.laws, targets, random)
        return Judgement(selection.nodes, selection.tokens[-1])
