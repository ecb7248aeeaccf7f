"""Judgements of real drafts, recorded once and replayed under any controller."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from anabranch.evaluation.languages import Language, pretrained
from anabranch.evaluation.speculation.replay import JudgedRequest
from anabranch.models.progress import Progress, silent

TARGET_LAYERS, DRAFT_LAYERS = 4, 1
STEPS = 400
BEGINNING = 8
"""Bytes of running text that the target goes on from."""


def model_pair(seed: int, progress: Progress = silent) -> tuple[Any, Any, Language]:
    """A target and a draft model a quarter as deep, both trained on the same language."""
    language = Language(seed)
    target, draft = (
        pretrained(language, steps=STEPS, layers=layers, seed=seed, progress=progress)
        for layers in (TARGET_LAYERS, DRAFT_LAYERS)
    )
    return target, draft, language


@torch.inference_mode()
def judgements(
    target: Any, draft: Any, language: Language, texts: int, length: int, seed: int
) -> np.ndarray:
    """[texts, length]: whether a token drafted there would be accepted, at temperature 1.

    The target samples texts; the judgement of a token is drawn given that it came out. A draft x
    is accepted and emitted with probability min(p(x), q(x)), and x is emitted with probability
    q(x), so that an emitted x was an accepted draft with probability min(1, p(x) / q(x)),
    whatever happens elsewhere.
    """
    rng = np.random.default_rng([seed, 31])
    starts = [list(language.text(BEGINNING, rng).encode()) for _ in range(texts)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokens = target.generate(
            torch.tensor(starts), max_new_tokens=length, do_sample=True, top_k=0, pad_token_id=0
        )
    emitted = tokens[:, BEGINNING:, None]
    p, q = (
        network(tokens).logits[:, BEGINNING - 1 : -1].softmax(-1).gather(2, emitted)[..., 0]
        for network in (draft, target)
    )
    return rng.random((texts, length)) < (p / q).numpy()


def judged_traffic(
    flags: np.ndarray, requests: int, rate: float, prompt: tuple[float, float], seed: int
) -> list[JudgedRequest]:
    """Poisson arrivals whose outputs are recorded ones, cut at a random length above a half."""
    rng = np.random.default_rng([seed, 37])
    texts, length = flags.shape
    return [
        JudgedRequest(
            float(moment),
            max(1, round(rng.normal(*prompt))),
            flags[rng.integers(texts), : rng.integers(length // 2, length + 1)],
        )
        for moment in np.cumsum(rng.exponential(1 / rate, requests))
    ]
