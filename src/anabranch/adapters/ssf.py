"""SSF: scale and shift what a module gives, ``y * gamma + beta`` (Lian et al. 2022, equation 5)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from anabranch.adapters.base import AdapterConfig, Branch, Site, Tuner
from anabranch.adapters.errors import NotMergeable
from anabranch.adapters.info import MethodInfo


@dataclass
class SSFConfig(AdapterConfig):
    """Options of SSF."""

    shift: bool = field(
        default=True,
        metadata={"help": "Train beta too. Merging it gives every adapted module a bias."},
    )
    init_std: float = field(
        default=0.0, metadata={"help": "Of gamma around 1 and beta around 0; 0 starts as the base."}
    )
    method: ClassVar[str] = "ssf"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.init_std >= 0, f"init_std is not negative, unlike {self.init_std}")


class ScaleShift(Branch):
    """``y * gamma + beta`` on the output of a linear module or a norm."""

    place = "output"
    kinds = ("linear", "norm")

    def __init__(self, site: Site, config: SSFConfig) -> None:
        super().__init__(site, config)
        self.site_name = site.name
        # An RMSNorm has no bias that a merged shift could go to.
        self.takes_bias = site.kind == "linear" or isinstance(site.module, nn.LayerNorm)
        self.gamma = nn.Parameter(torch.normal(1.0, config.init_std, (site.out_features,)))
        self.beta = (
            nn.Parameter(torch.normal(0.0, config.init_std, (site.out_features,)))
            if config.shift
            else None
        )

    def forward(self, z: Tensor) -> Tensor:
        """[..., features] -> the same."""
        scaled = z * self.gamma
        return scaled if self.beta is None else scaled + self.beta

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Scale the weight's rows, scale and shift the bias, which is made if there is none."""
        gamma = self.gamma if weight.dim() == 1 else self.gamma[:, None]
        bias = None if bias is None else bias * self.gamma
        if self.beta is not None:
            if not self.takes_bias:
                raise NotMergeable(
                    f"{self.site_name} has no bias for the shift; train SSF with shift=False there"
                )
            bias = self.beta if bias is None else bias + self.beta
        return weight * gamma, bias


class SSFTuner(Tuner):
    """Scale and shift the outputs of linear and norm modules; merges exactly."""

    branch = ScaleShift
    info = MethodInfo(
        name="ssf",
        summary="Scales and shifts the features that modules give.",
        family="additive",
        leaf="other",
        paper="SSF (Lian et al. 2022), arXiv:2210.08823",
        config=SSFConfig,
        source="anabranch",
        mixed_batch=True,
        merge_note="an RMSNorm has no bias for the shift; train with shift=False there",
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {}


SSFTuner.enlist()
