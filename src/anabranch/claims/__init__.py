"""Claims: experiments that re-measure what a published system promises.

A claim runs the method and its baseline on the same data, with the same budget and seeds, and says
whether the effect shows on this machine. One file per system; ``anabranch claims run NAME`` runs
it. What several claims need belongs to ``evaluation``.
"""

from anabranch.claims.base import Claim, ClaimResult, Measurement, find, run_claim

__all__ = ["Claim", "ClaimResult", "Measurement", "find", "run_claim"]
