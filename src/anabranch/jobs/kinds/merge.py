"""An adapter and its base as one model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anabranch.errors import ConfigurationError
from anabranch.jobs.kinds.base import JobKind, Terms, anabranch


class MergeSpec(Terms):
    """``adapter`` is a folder in PEFT's format, ``base`` its model, ``model`` a name for both."""

    base: str
    adapter: str
    model: str


class Merge(JobKind[MergeSpec]):
    """``anabranch adapters merge``: a new model, for who serves one adapter only."""

    name = "merge"
    spec = MergeSpec
    heading = "Merges"
    example = "base: smollm2\nadapter: runs/arithmetic/adapter\nmodel: smollm2-arithmetic\n"

    def from_words(self, words: Sequence[str]) -> dict[str, Any]:
        """Base, adapter and name, as ``anabranch adapters merge`` takes them."""
        from anabranch.models.source import absolute
        from anabranch.training.deploy import find_adapter

        if len(words) != 3:
            raise ConfigurationError(f"merge takes BASE ADAPTER NAME, not {len(words)} words")
        return {
            "base": absolute(words[0]), "adapter": str(find_adapter(words[1])), "model": words[2],
        }  # fmt: skip

    def check(self, values: Any) -> MergeSpec:
        """The folder must be an adapter's, and the name one."""
        from anabranch.training.deploy import require_mergeable

        spec = super().check(values)
        require_mergeable(Path(spec.adapter), spec.model)
        return spec

    def title(self, spec: MergeSpec) -> str:
        """The result's name."""
        return spec.model

    def command(self, spec: MergeSpec, folder: Path) -> list[str]:
        """The same command finds what an earlier attempt has written."""
        return anabranch("adapters", "merge", spec.base, spec.adapter, spec.model, "--json")
