"""The number format that a model should be computed in on this machine."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from anabranch.models.card import ModelCard

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

BFLOAT16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
"""Capabilities, as torch names them, of processors that multiply bfloat16 natively."""


def fastest_dtype(card: ModelCard, device: torch.device) -> torch.dtype:
    """The stored type, unless this processor only emulates it.

    A processor without bfloat16 instructions multiplies float32 several times faster. The
    weights then take twice the memory, so it is done only if they fit in half of what is free.
    """
    import psutil
    import torch

    stored: torch.dtype = getattr(torch, card.dtype)
    if device.type != "cpu" or stored == torch.float32:
        return stored
    capabilities = torch.cpu.get_capabilities()
    if stored == torch.bfloat16 and any(capabilities.get(i) for i in BFLOAT16_INSTRUCTIONS):
        return stored
    if card.parameters * 4 > psutil.virtual_memory().available // 2:
        logger.warning("%s stays %s: float32 would be faster but not fit", card.name, card.dtype)
        return stored
    logger.info("computing in float32: this processor only emulates %s", card.dtype)
    return torch.float32
