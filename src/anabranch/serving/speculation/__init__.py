"""Tokens that are drafted and then verified together, instead of computed one after the other.

A :class:`Proposer` drafts, the target model's step verifies, and a :class:`SpeculationController`
decides each step how much of it pays. What is emitted has the target's law, whoever drafts.
"""

from anabranch.serving.speculation.controller import Load, SpeculationController
from anabranch.serving.speculation.proposal import Proposal
from anabranch.serving.speculation.proposer import DraftingContext, Proposer
from anabranch.serving.speculation.verification import Verifier

__all__ = [
    "DraftingContext",
    "Load",
    "Proposal",
    "Proposer",
    "SpeculationController",
    "Verifier",
]
