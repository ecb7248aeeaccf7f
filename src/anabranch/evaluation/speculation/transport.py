"""The best that any way of judging k independent drafts can do.

Optimal transport with membership cost (Sun et al. 2023, section 4): over all joint laws of k
independent draws from p and one token of law q, the largest chance that the token is among the
draws.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import torch
from torch import Tensor

from anabranch.errors import MissingExtra


def optimal_acceptance(p: Tensor, q: Tensor, k: int) -> Tensor:
    """The optimum for laws ``[..., vocabulary]``; returns ``[...]``, in O(vocabulary log).

    Mass flows from sets of drafted tokens to tokens in them, so that by minimum cut the optimum is
    the least of q(T) + 1 - p(T)^k over sets of tokens T. That is concave in (p(T), q(T)) and
    therefore least at a corner of the convex hull of these points: at the tokens with the smallest
    q / p, for some number of them.
    """
    p, q = (law.double() / law.double().sum(-1, keepdim=True) for law in (p, q))
    order = (q / p).nan_to_num(nan=torch.inf).argsort(dim=-1)
    drafted = p.gather(-1, order).cumsum(-1)
    wanted = q.gather(-1, order).cumsum(-1)
    cuts = wanted + 1 - drafted.clamp(max=1.0) ** k
    return cuts.amin(-1).clamp(max=1.0)


def optimal_transport_plan(p: np.ndarray, q: np.ndarray, k: int) -> tuple[np.ndarray, float]:
    """The linear program itself: a plan ``[vocabulary^k, vocabulary]`` and its acceptance.

    Row i belongs to the i-th of ``itertools.product(range(vocabulary), repeat=k)``. For small
    cases: there are vocabulary^(k+1) variables. Raises :class:`MissingExtra` without scipy.
    """
    try:
        from scipy.optimize import linprog
        from scipy.sparse import eye_array, kron, vstack
    except ImportError:
        raise MissingExtra("scipy", "train") from None

    size = len(p)
    drafts = np.array(list(product(range(size), repeat=k)))  # [size^k, k]
    member = (drafts[:, :, None] == np.arange(size)).any(1)  # [size^k, size]
    rows = kron(eye_array(len(drafts)), np.ones((1, size)))
    columns = kron(np.ones((1, len(drafts))), eye_array(size))
    marginals = np.concatenate([p[drafts].prod(1), q])
    # The mass that is accepted may be any part of what there is. As equations the marginals would
    # contradict each other by rounding.
    found = linprog(
        -member.ravel().astype(float), A_ub=vstack([rows, columns]), b_ub=marginals, method="highs"
    )
    accepted = found.x.reshape(len(drafts), size)
    left, wanted = marginals[: len(drafts)] - accepted.sum(1), q - accepted.sum(0)
    rest = np.outer(left, wanted) / max(wanted.sum(), np.finfo(float).tiny)
    return accepted + rest, -float(found.fun)
