"""Claims, measured again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from anabranch.jobs.kinds.base import JobKind, Terms, anabranch
from anabranch.jobs.layout import RESULT


class EvaluateSpec(Terms):
    """``claims`` are ids (S46) or names."""

    claims: Annotated[list[str], Field(min_length=1)]
    seed: Annotated[int, Field(ge=0)] = 0


class Evaluate(JobKind[EvaluateSpec]):
    """``anabranch claims run``: what published systems promise, measured here."""

    name = "evaluate"
    spec = EvaluateSpec
    heading = "Evaluations"
    example = "claims: [S46]\nseed: 0\n"

    def from_words(self, words: Sequence[str]) -> dict[str, Any]:
        """Claims."""
        return {"claims": list(words)}

    def check(self, values: Any) -> EvaluateSpec:
        """The claims must exist."""
        from anabranch.claims import find

        spec = super().check(values)
        for name in spec.claims:
            find(name)
        return spec

    def title(self, spec: EvaluateSpec) -> str:
        """Their ids."""
        return ", ".join(spec.claims)

    def command(self, spec: EvaluateSpec, folder: Path) -> list[str]:
        """One after the other."""
        return anabranch("claims", "run", *spec.claims, "--seed", str(spec.seed), "--json")

    def succeeded(self, status: int, folder: Path) -> bool:
        """A claim that does not hold was measured just as well."""
        lines = (folder / RESULT).read_text("utf-8").splitlines()
        return status == 0 or (status == 1 and bool(lines) and all(map(_is_result, lines)))


def _is_result(line: str) -> bool:
    try:
        return "verdict" in json.loads(line)
    except (ValueError, TypeError):
        return False
