"""The serving engine: many requests, one model, one packed batch per step.

What belongs here: everything between token ids that come in and tokens that go out - scheduling,
the paged cache, model runners, sampling, detokenisation - and later co-served finetuning,
speculation, constraints and fleets. HTTP does not belong here (``api``), nor does finding and
loading models (``models``).
"""

from __future__ import annotations

from anabranch.serving.engine import Engine, StepOutput
from anabranch.serving.kv_cache import KVCacheManager
from anabranch.serving.model import EngineModel
from anabranch.serving.options import EngineOptions
from anabranch.serving.policies import Policy
from anabranch.serving.scheduler import TokenBudgetScheduler
from anabranch.serving.sequence import Request, Segment, Sequence

__all__ = [
    "Engine",
    "EngineModel",
    "EngineOptions",
    "KVCacheManager",
    "Policy",
    "Request",
    "Segment",
    "Sequence",
    "StepOutput",
    "TokenBudgetScheduler",
]
