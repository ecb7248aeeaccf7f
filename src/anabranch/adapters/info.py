"""What is known about a method before it is built."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from peft import PeftConfig

Family = Literal["additive", "selective", "reparameterised", "hybrid"]
"""The survey's four (Han et al. 2024, section 3)."""

Engine = Literal["batched", "own branch", "no"]
"""How the serving engine runs it. ``batched``: rows of any number of such adapters are computed
together (fused runner). ``own branch``: PEFT's modules around the same weights, the rows of one
adapter at a time (transformers runner). ``no``: it cannot be served."""


@dataclass(frozen=True)
class Size:
    """The option that sets how many weights are trained.

    ``values`` are the settings to try, in order of growing count; None means 1, 2, 3, ...
    """

    option: str
    values: tuple[float, ...] | None = None


@dataclass(frozen=True)
class MethodInfo:
    """A parameter-efficient method: where it stands, what it can do, how it is configured."""

    name: str
    summary: str
    family: Family
    leaf: str
    paper: str
    config: type[PeftConfig]
    source: Literal["peft", "anabranch"] = "peft"
    targets: str | Sequence[str] | None = "all-linear"
    """What is adapted unless ``target_modules`` says otherwise (see :mod:`.targets`). None: the
    method has no such choice."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Our defaults where they differ from the configuration class's."""
    size: Size | None = None
    mergeable: bool = True
    """Whether the adapted model equals a model with other weights and no adapter."""
    merge_note: str = ""
    """Why not, or under which condition."""
    multi_adapter: bool = True
    """Whether a model can hold several trainable adapters of the method by name."""
    mixed_batch: bool = False
    """Whether the rows of one batch may name different adapters (``adapter_names=[...]``)."""
    engine: Engine = "own branch"
    conv1d: bool = True
    """Whether it adapts GPT-2's linear modules, which store their weight transposed."""
    on_meta: bool = True
    """Whether it can be built on shapes alone, to be counted; else it reads the base's weights."""
    inputs: tuple[str, ...] = ()
    """What the forward pass needs beside tokens."""

    def options(self) -> dict[str, Any]:
        """Options that :func:`build` takes, with defaults."""
        common = {f.name for f in dataclasses.fields(PeftConfig)}
        options = {}
        for option in dataclasses.fields(self.config):
            if option.name in common or not option.init:
                continue
            if option.default_factory is not dataclasses.MISSING:
                options[option.name] = option.default_factory()
            else:
                options[option.name] = option.default
        if "target_modules" in options and self.targets is not None:
            options["target_modules"] = self.targets
        return options | dict(self.defaults)

    def help(self, option: str) -> str:
        """The first sentence of what the configuration class says of an option."""
        (found,) = (f for f in dataclasses.fields(self.config) if f.name == option)
        text = " ".join(str(found.metadata.get("help", "")).split())
        return text.partition(". ")[0].rstrip(".") + "." if text else ""
