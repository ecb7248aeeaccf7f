"""Losses on scores and embeddings that the recommenders share. All are sums over the batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bpr(positive: Tensor, negative: Tensor) -> Tensor:
    """Bayesian personalised ranking: -log sigmoid(positive [b] - negative [b]).

    Rendle et al., "BPR: Bayesian Personalized Ranking from Implicit Feedback" (UAI 2009).
    """
    return F.softplus(negative - positive).sum()


def weighted_bce(
    positive: Tensor, negative: Tensor, positive_weight: Tensor, negative_weight: Tensor
) -> Tensor:
    """Log loss of positives [b] and the mean over negatives [b, k], both with weights."""
    of_positives = positive_weight * F.softplus(-positive)
    of_negatives = (negative_weight * F.softplus(negative)).mean(dim=1)
    return (of_positives + of_negatives).sum()


def squared(*embeddings: Tensor) -> Tensor:
    """Half the sum of squares of everything given: the usual L2 penalty."""
    return torch.stack([e.square().sum() for e in embeddings]).sum() / 2
