"""Answers that keep to a schema, pattern, grammar or list of choices.

What belongs here: compiling constraints to masks over the vocabulary. The engine asks for the masks
and tells what was drawn; the HTTP API makes constraints of ``response_format`` and ``tools``.
"""

from anabranch.serving.constraints.base import (
    CompiledConstraint,
    ConstraintBackend,
    ConstraintState,
    Whitespace,
)
from anabranch.serving.constraints.cache import CompiledCache
from anabranch.serving.constraints.compiler import ConstraintCompiler, ConstraintLimits
from anabranch.serving.constraints.vocabulary import Vocabulary

__all__ = [
    "CompiledCache",
    "CompiledConstraint",
    "ConstraintBackend",
    "ConstraintCompiler",
    "ConstraintLimits",
    "ConstraintState",
    "Vocabulary",
    "Whitespace",
]
