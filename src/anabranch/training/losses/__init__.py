"""Losses over the answer tokens of language models; each module is one, found by its ``name``.

A loss sees the negative log-likelihood of every trained token of a micro-batch and where each
belongs, never the model: the forward pass, packing and the head on wanted rows are written once, in
:mod:`anabranch.training.language`.
"""

from anabranch.training.losses.balance import Balancer
from anabranch.training.losses.base import Loss, TokenScores

__all__ = ["Balancer", "Loss", "TokenScores"]
