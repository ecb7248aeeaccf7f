"""Preference losses over pairs: an item is the chosen example and the rejected one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from anabranch.errors import ConfigurationError, did_you_mean
from anabranch.training.errors import DataError
from anabranch.training.example import Item
from anabranch.training.losses.base import Loss, TokenScores
from anabranch.training.objective import LossOutput

Variant = Literal["sigmoid", "ipo", "hinge"]


class DPO(Loss):
    """Direct preference optimisation: raise the chosen answer over the rejected one.

    With ``h`` the margin ``(lp_c - ref_c) - (lp_r - ref_r)``, ``lp`` the log-probability of an
    answer (summed over its trained tokens) and ``ref`` that of the reference:

    - ``sigmoid``: ``-log sigmoid(beta h)`` (Rafailov et al., 2023, equation 7); ``label_smoothing``
      is the share of pairs assumed to be swapped (Mitchell, 2023).
    - ``ipo``: ``(h - 1 / (2 beta))^2`` (Azar et al., 2023, equation 17).
    - ``hinge``: ``max(0, 1 - beta h)`` (Zhao et al., 2023).

    The reference is the model with its adapter switched off; nothing is loaded twice. Known
    problem: at a high learning rate both answers lose probability; 5e-6 with LoRA is a good start.

    Example: ``LanguageObjective(DPO(beta=0.1))`` on items ``(chosen, rejected)``.
    """

    name = "dpo"
    needs_reference = True
    texts = 2

    def __init__(
        self, beta: float = 0.1, variant: Variant = "sigmoid", label_smoothing: float = 0.0
    ) -> None:
        if beta <= 0:
            raise ConfigurationError(f"beta must be positive, not {beta}")
        if variant not in get_args(Variant):
            known = get_args(Variant)
            raise ConfigurationError(
                f"variant must be one of {', '.join(known)}, not {variant!r}"
                f"{did_you_mean(variant, known)}"
            )
        if not 0 <= label_smoothing < 0.5:
            raise ConfigurationError(
                f"label_smoothing must be at least 0 and below 0.5, not {label_smoothing}"
            )
        if label_smoothing and variant != "sigmoid":
            raise ConfigurationError(f"label_smoothing belongs to sigmoid, not to {variant}")
        self.beta = beta
        self.variant = variant
        self.label_smoothing = label_smoothing

    def denominators(self, items: Sequence[Item]) -> Mapping[str, float]:
        """``pairs``."""
        _require_pairs(items)
        return {"pairs": len(items)}

    def __call__(self, scores: TokenScores, denominators: Mapping[str, float]) -> LossOutput:
        """Sum of the pairs' losses over the step's pairs."""
        assert scores.reference is not None
        gain = _answer_sums(scores, scores.reference - scores.nll)  # [pairs, 2], lp - ref
        margin = gain[:, 0] - gain[:, 1]
        rewards = self.beta * gain.detach()
        accurate = rewards[:, 0] > rewards[:, 1]
        return LossOutput(
            self.pair_losses(margin).sum() / denominators["pairs"],
            {
                "pairs": float(len(margin)),
                "accurate": float(accurate.sum()),
                "reward_chosen": float(rewards[:, 0].sum()),
                "reward_rejected": float(rewards[:, 1].sum()),
            },
        )

    def pair_losses(self, margin: Tensor) -> Tensor:
        """Loss ``[pairs]`` of the margins ``h`` ``[pairs]``."""
        if self.variant == "ipo":
            return (margin - 1 / (2 * self.beta)) ** 2
        if self.variant == "hinge":
            return F.relu(1 - self.beta * margin)
        logit, smoothing = self.beta * margin, self.label_smoothing
        return -(1 - smoothing) * F.logsigmoid(logit) - smoothing * F.logsigmoid(-logit)

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Share of pairs ranked right, mean rewards ``beta (lp - ref)`` and their difference."""
        if not sums.get("pairs"):
            return {}
        chosen, rejected = (sums[f"reward_{s}"] / sums["pairs"] for s in ("chosen", "rejected"))
        return {
            "accuracy": sums["accurate"] / sums["pairs"],
            "reward_chosen": chosen,
            "reward_rejected": rejected,
            "reward_margin": chosen - rejected,
        }


class ORPO(Loss):
    """Odds-ratio preference optimisation: fine-tuning and preference in one loss, no reference.

    ``NLL(chosen) + weight * -log sigmoid(log odds(chosen) - log odds(rejected))`` with
    ``odds(p) = p / (1 - p)`` and p the geometric mean of an answer's token probabilities (Hong et
    al., 2024, equations 4 to 7). The first term is averaged over the chosen tokens of the step.
    """

    name = "orpo"
    texts = 2

    def __init__(self, weight: float = 0.1) -> None:
        if weight < 0:
            raise ConfigurationError(f"weight must not be negative, not {weight}")
        self.weight = weight

    def denominators(self, items: Sequence[Item]) -> Mapping[str, float]:
        """``pairs``, and ``tokens``: trained tokens of the chosen examples."""
        _require_pairs(items)
        return {"pairs": len(items), "tokens": sum(chosen.targets for chosen, _ in items)}

    def __call__(self, scores: TokenScores, denominators: Mapping[str, float]) -> LossOutput:
        """Both terms, each over its count of the step."""
        counts = torch.tensor([[c.targets, r.targets] for c, r in scores.items])
        means = _answer_sums(scores, -scores.nll) / counts.to(scores.nll.device)  # [pairs, 2]
        log_odds = means - _log1mexp(means)
        ratio = log_odds[:, 0] - log_odds[:, 1]
        nll = scores.nll[scores.example == 0].sum()
        odds_loss = -F.logsigmoid(ratio).sum()
        return LossOutput(
            nll / denominators["tokens"] + self.weight * odds_loss / denominators["pairs"],
            {
                "pairs": float(len(ratio)),
                "tokens": float(counts[:, 0].sum()),
                "nll": float(nll.detach()),
                "odds_loss": float(odds_loss.detach()),
                "accurate": float((ratio.detach() > 0).sum()),
            },
        )

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Loss of the chosen answers per token, mean odds loss, share of pairs ranked right."""
        if not sums.get("pairs"):
            return {}
        return {
            "nll": sums["nll"] / sums["tokens"],
            "odds_loss": sums["odds_loss"] / sums["pairs"],
            "accuracy": sums["accurate"] / sums["pairs"],
        }


def _require_pairs(items: Sequence[Item]) -> None:
    for item in items:
        if len(item) != 2:
            source = item[0].source if item else ""
            raise DataError(
                f"{source or 'an item'} has {len(item)} examples; a preference loss needs two, the "
                f"chosen answer and the rejected one"
            )


def _answer_sums(scores: TokenScores, values: Tensor) -> Tensor:
    """Values ``[trained]`` summed over each answer: ``[pairs, 2]``."""
    sums = torch.zeros(2 * len(scores.items), dtype=values.dtype, device=values.device)
    return sums.index_add(0, 2 * scores.item + scores.example, values).view(-1, 2)


def _log1mexp(x: Tensor) -> Tensor:
    """``log(1 - exp(x))`` for negative x, accurate at both ends (Maechler, 2012)."""
    # Just below zero: an answer of probability one has infinite odds.
    x = x.clamp(max=-1e-7)
    near_zero = x > -math.log(2)
    # Both branches are evaluated, so each gets an argument at which its gradient is finite.
    near = torch.log(-torch.expm1(torch.where(near_zero, x, -1.0)))
    far = torch.log1p(-torch.exp(torch.where(near_zero, -1.0, x)))
    return torch.where(near_zero, near, far)
