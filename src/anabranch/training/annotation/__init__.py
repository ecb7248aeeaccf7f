"""Labelling with people in the loop: models propose, people reject, one model learns.

Proposals (:class:`Crowd`), the review queue, agreement of coders and the probability of labels
belong here; training on the result is an ordinary run, metrics are in
:mod:`anabranch.evaluation.classification`. The workflow is that of Rethinking Scale (Carammia et
al., 2024), section 3.
"""

from anabranch.training.annotation.agreement import (
    Agreement,
    Decision,
    Verdict,
    aggregate,
    agreement,
    cohen_kappa,
    fleiss_kappa,
)
from anabranch.training.annotation.crowd import (
    Crowd,
    Labelled,
    Labeller,
    ModelLabeller,
    Proposal,
)
from anabranch.training.annotation.queue import QueueLocked, Review, ReviewQueue
from anabranch.training.annotation.scoring import Asker, LabelScores
from anabranch.training.annotation.table import Document, conflicting, read_documents

__all__ = [
    "Agreement",
    "Asker",
    "Crowd",
    "Decision",
    "Document",
    "LabelScores",
    "Labelled",
    "Labeller",
    "ModelLabeller",
    "Proposal",
    "QueueLocked",
    "Review",
    "ReviewQueue",
    "Verdict",
    "aggregate",
    "agreement",
    "cohen_kappa",
    "conflicting",
    "fleiss_kappa",
    "read_documents",
]
