"""When to contrast two next-token laws, and how (USCD).

A *law* is a row of probabilities over the vocabulary: softmax after constraint masks and
temperature, before top-k and top-p. Of the two rows, ``standard`` comes from the prompt as it was
asked and ``lame`` from the prompt without its examples. What the lame row is sure of is what the
model writes out of habit; at steps where the standard row is unsure, part of the lame row is
subtracted from it::

    c = sigma * sqrt(V)            sigma: standard deviation of the standard row's entries
    c >= threshold                 confident: the standard row stays as it is
    c <  threshold                 s = p + weight * q   where p >= filter_ratio / V, else 0
                                   logits = log(max(s, 0))

This module knows rows only: not where they come from, nor what is sampled from the result.
Source: Wang et al., "USCD: Improving Code Generation of LLMs by Uncertainty-Aware Selective
Contrastive Decoding", sections 3.2 and 3.3. The normalisation by the vocabulary is ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from anabranch.errors import InvalidRequest, RequestFailed

REFERENCE_DEVIATION, REFERENCE_VOCABULARY = 0.005, 32_000
"""The paper's threshold on sigma, and the vocabulary size that it was chosen for."""


@dataclass(frozen=True)
class UncertaintyContrast:
    """Contrast at uncertain steps only.

    ``threshold`` bounds ``c``, which is 0 for a uniform row and 1 for a one-hot row whatever the
    vocabulary: c^2 = V / (V - 1) * (sum of p^2 - 1 / V), so it is the collision probability in
    disguise. The default is the reference's sigma of 0.005 at 32,000 tokens. 0 never contrasts,
    more than 1 always does. ``weight`` of the lame row is at most 0; ``filter_ratio`` says how much
    less likely than the average token a token may be and still be chosen.

    Raises :class:`InvalidRequest` naming the field. Example::

        contrast = UncertaintyContrast()
        unsure = contrast.uncertain(standard)
        logits = standard.log()
        logits[unsure] = contrast.mix(standard[unsure], lame[unsure])
    """

    threshold: float = REFERENCE_DEVIATION * REFERENCE_VOCABULARY**0.5
    weight: float = -0.7
    filter_ratio: float = 2 / 3

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise InvalidRequest(
                "contrast.threshold",
                f"must be 0 (never contrast) or more, up to 1 for a certain step, "
                f"not {self.threshold}",
            )
        if self.weight > 0:
            raise InvalidRequest(
                "contrast.weight",
                f"must be 0 or less, not {self.weight}: adding the lame prompt's law would be "
                "ensembling, and bring in the habit that is to be taken out",
            )
        if not math.isfinite(self.weight):
            raise InvalidRequest("contrast.weight", f"must be a finite number, not {self.weight}")
        if not (self.filter_ratio >= 0 and math.isfinite(self.filter_ratio)):
            raise InvalidRequest(
                "contrast.filter_ratio",
                f"must be a finite number, 0 (no filter) or more, not {self.filter_ratio}",
            )

    def uncertain(self, laws: Tensor) -> Tensor:
        """Which rows of ``laws [rows, V]`` are to be contrasted, bool ``[rows]``.

        Raises :class:`RequestFailed` for rows that are no law (NaN, infinite or negative entries).
        """
        return certainty(laws) < self.threshold

    def mix(self, standard: Tensor, lame: Tensor) -> Tensor:
        """Logits ``[rows, V]``, float32, of the contrast of laws ``[rows, V]``.

        They are logarithms of weights that do not add up to 1; ``-inf`` where nothing is left of a
        token. Where nothing is left of a whole row, the standard row decides (the reference code
        would sample from NaN). Raises as :meth:`uncertain`.
        """
        if standard.shape != lame.shape:
            raise ValueError(
                f"the laws must have one shape [rows, V]: standard {list(standard.shape)}, "
                f"lame {list(lame.shape)}"
            )
        standard, lame = _checked(standard), _checked(lame)
        plausible = standard >= self.filter_ratio / standard.shape[-1]
        weights = (standard + self.weight * lame).clamp_min(0.0).where(plausible, 0.0)
        nothing_left = ~(weights > 0).any(dim=-1, keepdim=True)
        return torch.where(nothing_left, standard, weights).log()


def certainty(laws: Tensor) -> Tensor:
    """``c`` of each row of ``laws [rows, V]``, float32 ``[rows]``: 0 uniform, 1 one-hot.

    Raises :class:`RequestFailed` for rows that are no law.
    """
    laws = _checked(laws)
    vocabulary = laws.shape[-1]
    if laws.shape[0] == 0 or vocabulary == 1:  # one token leaves no choice, hence no doubt
        return torch.ones(laws.shape[0], device=laws.device)
    return laws.std(dim=-1, correction=1) * math.sqrt(vocabulary)


def _checked(laws: Tensor) -> Tensor:
    """In float32. NaN would compare as certain and infinity as a token: both are refused here."""
    if laws.ndim != 2 or laws.shape[-1] == 0:
        raise ValueError(f"laws must be [rows, V] with V >= 1, not {list(laws.shape)}")
    laws = laws.float()
    if laws.shape[0] == 0:
        return laws
    low, high = laws.aminmax(dim=-1)  # NaN in a row makes both NaN
    bad = ~((low >= 0) & (high < math.inf))
    if bad.any():
        rows = bad.nonzero()[:, 0].tolist()
        raise RequestFailed(
            f"contrast: rows {rows} of the next-token law have NaN, infinite or negative entries; "
            "the model or an adapter overflowed (try float32)"
        )
    return laws
