"""BitFit: train the biases that the base has, and nothing else (Ben Zaken et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from anabranch.adapters.base import AdapterConfig, Branch, Site, Tuner
from anabranch.adapters.errors import AdapterError
from anabranch.adapters.info import MethodInfo
from anabranch.adapters.targets import is_linear, is_norm, plain_modules


@dataclass
class BitFitConfig(AdapterConfig):
    """Options of BitFit; without targets, every module that has a bias."""

    method: ClassVar[str] = "bitfit"


class BiasDelta(Branch):
    """``y + delta``: a change of the bias, kept apart from the base."""

    place = "output"
    kinds = ("linear", "norm")

    def __init__(self, site: Site, config: BitFitConfig) -> None:
        super().__init__(site, config)
        if getattr(site.module, "bias", None) is None:
            raise AdapterError(f"bitfit: {site.name} has no bias, and BitFit adds none")
        self.delta = nn.Parameter(torch.zeros(site.out_features))

    def forward(self, z: Tensor) -> Tensor:
        """[..., out] -> the same."""
        return z + self.delta

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``b + delta``."""
        return weight, self.delta if bias is None else bias + self.delta


class BitFitTuner(Tuner):
    """Trains the base's biases."""

    branch = BiasDelta
    info = MethodInfo(
        name="bitfit",
        summary="Trains the biases that the base has.",
        family="selective",
        leaf="structured",
        paper="BitFit (Ben Zaken et al. 2022), arXiv:2106.10199",
        config=BitFitConfig,
        source="anabranch",
        targets=None,
        mixed_batch=True,
    )

    def default_targets(self, config: Any) -> Sequence[str]:
        """All modules with a bias; :class:`AdapterError` if there is none."""
        biased = [
            name
            for name, module in plain_modules(self.model).items()
            if getattr(module, "bias", None) is not None and (is_linear(module) or is_norm(module))
        ]
        if not biased:
            raise AdapterError(
                f"bitfit trains biases, and {type(self.model).__name__} has none in its linear and "
                f"norm modules; train norms with ln_tuning, or add scales and shifts with ssf"
            )
        return biased


BitFitTuner.enlist()
