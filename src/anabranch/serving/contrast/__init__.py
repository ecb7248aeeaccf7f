"""Uncertainty-aware selective contrastive decoding (USCD).

Rows of logits (:mod:`.uncertainty`), prompts without examples (:mod:`.lame_prompt`), and both put
together for transformers' ``generate`` (:mod:`.processor`, imported on demand).
"""

from anabranch.serving.contrast.lame_prompt import lame_prompt
from anabranch.serving.contrast.uncertainty import UncertaintyContrast, certainty

__all__ = ["UncertaintyContrast", "certainty", "lame_prompt"]
