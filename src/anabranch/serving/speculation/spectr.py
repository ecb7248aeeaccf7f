"""SpecTr: judges several independent drafts at once, and leaves the model's distribution unchanged.

Source: Sun et al. 2023, "SpecTr: Fast Speculative Decoding via Optimal Transport", sections 4, 5.

With one draft, speculative decoding couples the draft law p and the target law q so that the two
agree as often as possible. With k drafts from p the question is an optimal transport: which joint
law of the k drafts and one token of law q has the token among the drafts most often? Its linear
program is exponential in k. k-SEQ is a plan that costs little more than reading the laws and is
within a factor 1 - (1 - 1/k)^k > 1 - 1/e of the optimum:

    accept draft x with min(1, q(x) / (rho p(x))), one draft after another
    if all are refused, draw from what q has left

The *division factor* rho makes room for k chances: with rho = 1 a token that the draft likes would
come out too often.

Known limit: all drafts that pass through a node must be there. A tree that was cut in the middle
of a level would favour some tokens, so that :func:`select` refuses it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from anabranch.serving.speculation.errors import InvalidLaw
from anabranch.serving.speculation.proposal import Proposal

NORMALISED = 1e-4
"""How far a law's sum may be from 1, unless its own precision is coarser."""
PRECISION = 1e-6
"""Of the division factor; rounded up, where the plan is still valid."""


class Selection(NamedTuple):
    """What the target accepted of a tree."""

    nodes: list[int]
    """Accepted nodes, from the root on."""
    tokens: list[int]
    """The accepted tokens and one more: the correction, or a token after a whole draft."""


def select(
    proposal: Proposal, draft_laws: Tensor, target_laws: Tensor, random: Random
) -> Selection:
    """Walk down a tree of independent drafts for as long as the target accepts one.

    ``draft_laws`` and ``target_laws`` ``[nodes + 1, vocabulary]``: row 0 is the law at the root,
    row 1 + i the law after node i, as sampled from (after temperature, truncation, constraints).
    Draft rows of leaves are not read, and rows off the accepted path cost nothing. The emitted
    tokens have exactly the law of tokens sampled from the target one by one.

    Raises :class:`InvalidLaw` if a law on the path is none, if a draft has probability 0 under
    its own law, or if drafts are missing.
    """
    nodes: list[int] = []
    tokens: list[int] = []
    node = -1
    while children := proposal.children[1 + node]:
        candidates = _candidates(proposal, node, children)
        # The tree groups equal tokens, and k-SEQ takes the first that it likes: the most frequent
        # one would gain. Any order that does not know the tokens will do; drafts are exchangeable.
        random.shuffle(candidates)
        p, q = _normalised(draft_laws[1 + node], target_laws[1 + node], f"after node {node}")
        token, _ = _judge(p, q, candidates, random.random)
        tokens.append(token)
        # Usually None for a correction. Where it is not, going on is as good: what the drafts
        # that share the token hold next does not depend on how the token was chosen.
        found = children.get(token)
        if found is None:
            return Selection(nodes, tokens)
        node = found
        nodes.append(node)
    bonus = _checked(target_laws[1 + node], f"after node {node}")
    return Selection(nodes, [*tokens, draw(bonus, random.random())])


def merge_drafts(drafts: Sequence[Sequence[int]]) -> tuple[Proposal, list[list[int]]]:
    """A tree in which drafts share their common beginnings, and the nodes of each draft.

    Nodes come level by level. ``counts`` keeps how many drafts pass through each: a token that was
    drafted twice is two candidates.
    """
    tokens: list[int] = []
    parents: list[int] = []
    counts: list[int] = []
    paths: list[list[int]] = [[] for _ in drafts]
    known: dict[tuple[int, int], int] = {}
    for depth in range(max(map(len, drafts), default=0)):
        for draft, path in zip(drafts, paths, strict=True):
            if depth >= len(draft):
                continue
            place = path[-1] if path else -1, draft[depth]
            node = known.setdefault(place, len(tokens))
            if node == len(tokens):
                parents.append(place[0])
                tokens.append(place[1])
                counts.append(0)
            counts[node] += 1
            path.append(node)
    return Proposal(tuple(tokens), tuple(parents), counts=tuple(counts)), paths


def kseq(
    p: Tensor,
    q: Tensor,
    candidates: Sequence[int],
    uniform: Callable[[], float],
    rho: float | None = None,
) -> tuple[int, int | None]:
    """One token of law ``q``, and the index of the candidate that it is; None for a correction.

    ``p``, ``q`` ``[vocabulary]``; ``candidates`` are independent draws from ``p``, equal ones
    included, in an order that does not depend on their values. ``uniform()`` gives numbers in
    [0, 1): one for each candidate that is judged, and one for a correction, so that a single
    candidate is judged as in rejection sampling. ``rho`` is the division factor if known.

    Raises :class:`InvalidLaw` for laws that are none, and for a candidate that ``p`` rules out.
    """
    if not candidates:
        raise InvalidLaw("k-SEQ needs at least one candidate")
    p, q = _normalised(p, q, "0")
    return _judge(p, q, candidates, uniform, rho)


def division_factor(p: Tensor, q: Tensor, k: int | Tensor) -> Tensor:
    """The least rho in [1, k] with which k-SEQ gives ``q``, to within :data:`PRECISION` above.

    ``p``, ``q`` ``[..., vocabulary]``, ``k`` a number or ``[...]``; returns ``[...]`` in double
    precision. With beta(rho) = sum_x min(p(x), q(x) / rho), the chance that one draft is accepted,
    it solves 1 - (1 - beta)^k = rho beta.
    """
    p, q, k, shape = _rows(p, q, k)
    return _division_factor(p, q, k).reshape(shape)


def acceptance_probability(p: Tensor, q: Tensor, k: int | Tensor) -> Tensor:
    """Chance that one of ``k`` drafts is accepted; shapes as in :func:`division_factor`."""
    p, q, k, shape = _rows(p, q, k)
    beta = _acceptance_of_one(p, q, _division_factor(p, q, k))
    return _any_of(beta, k).reshape(shape)


def residual(p: Tensor, q: Tensor, k: int | Tensor, rho: Tensor | float) -> Tensor:
    """Law ``[..., vocabulary]`` of the token after ``k`` refusals; shapes as in
    :func:`division_factor`, of which ``rho`` is the result.
    """
    p, q, k, shape = _rows(p, q, k)
    rho = torch.as_tensor(rho, dtype=torch.float64, device=p.device).expand(shape).reshape(-1)
    return _residual(p, q, k, rho).reshape(*shape, -1)


def draw(law: Tensor, uniform: float) -> int:
    """The token at which a law's cumulative sum passes ``uniform``, a number in [0, 1)."""
    cumulative = law.double().cumsum(dim=-1)
    token = int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))
    # Rounding may push the target to the very end; the last token with any mass is meant then.
    return token if token < len(law) else int(law.nonzero()[-1])


def _judge(
    p: Tensor,
    q: Tensor,
    candidates: Sequence[int],
    uniform: Callable[[], float],
    rho: float | None = None,
) -> tuple[int, int | None]:
    k = torch.tensor([len(candidates)], device=p.device)
    if rho is None and len(candidates) == 1:
        rho = 1.0
    factor = (
        _division_factor(p[None], q[None], k) if rho is None else torch.tensor([rho]).to(p)
    )  # [1]
    places = torch.tensor(candidates, device=p.device)
    drafted = p[places]
    if not bool((drafted > 0).all()):
        token = candidates[int((drafted <= 0).nonzero()[0])]
        raise InvalidLaw(f"token {token} was drafted, but its draft law gives it probability 0")
    chances = (q[places] / (factor * drafted)).tolist()
    for index, chance in enumerate(chances):
        if uniform() < chance:
            return candidates[index], index
    return draw(_residual(p[None], q[None], k, factor)[0], uniform()), None


def _division_factor(p: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """``p``, ``q`` ``[rows, vocabulary]``, ``k`` ``[rows]``."""
    rows = zip(p.cpu().numpy(), q.cpu().numpy(), k.tolist(), strict=True)
    return torch.tensor([_bisect(*row) for row in rows], dtype=p.dtype, device=p.device)


def _bisect(p: np.ndarray, q: np.ndarray, k: int) -> float:
    # For every rho in [1, k], the minimum is p where q >= k p, and q / rho where q <= p. Only the
    # tokens between, a small part of a vocabulary, must be looked at again and again.
    constant = float(p[q >= k * p].sum())
    inverse = float(q[(q <= p) & (q < k * p)].sum())
    between = (q > p) & (q < k * p)
    p, q = p[between], q[between]

    def too_small(rho: float) -> bool:
        beta = min(1.0, constant + inverse / rho + float(np.minimum(p, q / rho).sum()))
        some = 1.0 if beta == 1.0 else -math.expm1(k * math.log1p(-beta))
        return some > rho * beta

    low, high = 1.0, float(k)
    if not too_small(low):
        return low
    while high - low > PRECISION:
        middle = (low + high) / 2
        low, high = (middle, high) if too_small(middle) else (low, middle)
    return high


def _acceptance_of_one(p: Tensor, q: Tensor, rho: Tensor) -> Tensor:
    return torch.minimum(p, q / rho[:, None]).sum(-1).clamp(max=1.0)


def _any_of(beta: Tensor, k: Tensor) -> Tensor:
    """1 - (1 - beta)^k, also where beta is tiny."""
    return -torch.expm1(k * torch.log1p(-beta))


def _residual(p: Tensor, q: Tensor, k: Tensor, rho: Tensor) -> Tensor:
    accepted = torch.minimum(p, q / rho[:, None])
    beta = accepted.sum(-1).clamp(max=1.0)
    # Nothing is ever accepted where the laws share no token; any factor will do.
    factor = torch.where(beta > 0, _any_of(beta, k) / beta, 1.0)
    left = (q - accepted * factor[:, None]).clamp(min=0.0)
    total = left.sum(-1, keepdim=True)
    # Nothing is left where a draft is always accepted: nobody will draw from this.
    return torch.where(total > 0, left / total, q)


def _candidates(proposal: Proposal, node: int, children: dict[int, int]) -> list[int]:
    counts = proposal.counts or (1,) * len(proposal)
    candidates = [token for token, child in children.items() for _ in range(counts[child])]
    if node >= 0 and len(candidates) != counts[node]:
        raise InvalidLaw(
            f"{counts[node]} drafts pass through node {node}, but {len(candidates)} through its "
            f"children; leave out whole levels of a tree, or whole drafts"
        )
    return candidates


def _rows(p: Tensor, q: Tensor, k: int | Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """Laws ``[rows, vocabulary]`` and k ``[rows]``, checked, and the shape of results."""
    if p.dim() < 1 or p.shape != q.shape:
        raise InvalidLaw(
            f"draft and target laws must have one shape, not {list(p.shape)} and {list(q.shape)}"
        )
    shape = p.shape[:-1]
    k = torch.as_tensor(k, device=p.device).expand(shape).reshape(-1)
    if k.is_floating_point() or bool((k < 1).any()):
        raise InvalidLaw(f"k must be a whole number of drafts, at least 1, not {k.tolist()}")
    p, q = p.reshape(-1, p.shape[-1]), q.reshape(-1, q.shape[-1])
    return _checked(p, "of the draft"), _checked(q, "of the target"), k, tuple(shape)


def _normalised(p: Tensor, q: Tensor, where: str) -> tuple[Tensor, Tensor]:
    if p.shape != q.shape:
        raise InvalidLaw(
            f"laws {where}: the draft's vocabulary has {p.shape[-1]} tokens, "
            f"the target's {q.shape[-1]}"
        )
    return _checked(p, f"of the draft, {where}"), _checked(q, f"of the target, {where}")


def _checked(laws: Tensor, where: str) -> Tensor:
    """Laws ``[..., vocabulary]`` in double precision that sum to 1."""
    tolerance = max(NORMALISED, torch.finfo(laws.dtype).eps)
    rows = laws.double()
    total = rows.sum(-1, keepdim=True)
    # A comparison with NaN is false.
    good = ((total - 1).abs() <= tolerance)[..., 0] & (rows >= 0).all(-1)
    if not bool(good.all()):
        row = int((~good.reshape(-1)).nonzero()[0])
        bad = rows.reshape(-1, rows.shape[-1])[row]
        raise InvalidLaw(
            f"law {where}, row {row}: probabilities must be at least 0 and sum to 1; the least is "
            f"{float(bad.min()):g}, the sum {float(bad.sum()):g}"
        )
    return rows / total
