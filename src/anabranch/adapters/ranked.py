"""Low rank whose rank is found or chosen: DyLoRA and SoRA.

dylora   y = W x + s B[:, :q] A[:q] x     q drawn anew for every batch while training, so that
         every smaller rank is a valid truncation (Valipour et al. 2023, section 3)
sora     y = W x + s B (g * (A x))        the gate g is pushed to zero by a proximal step, and
         ranks whose gate is zero are dropped (Ding et al. 2023, equation 5)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.adapters.base import AdaptedLayer, AdapterConfig, Branch, Site, Tuner
from anabranch.adapters.errors import AdapterError
from anabranch.adapters.info import MethodInfo, Size


@dataclass
class RankedConfig(AdapterConfig):
    """Options that both methods have."""

    r: int = field(default=8, metadata={"help": "The largest rank."})
    alpha: float = field(default=16.0, metadata={"help": "The product is scaled by alpha / r."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.r >= 1, f"r is at least 1, not {self.r}")


class LowRank(Branch):
    """``s B A x``."""

    def __init__(self, site: Site, config: RankedConfig) -> None:
        super().__init__(site, config)
        self.scale = config.alpha / config.r
        self.A = nn.Parameter(torch.empty(config.r, site.in_features))
        self.B = nn.Parameter(torch.zeros(site.out_features, config.r))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))


@dataclass
class DyLoRAConfig(RankedConfig):
    """Options of DyLoRA."""

    rank: int | None = field(
        default=None, metadata={"help": "Use only the first so many ranks; None: all."}
    )
    method: ClassVar[str] = "dylora"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            self.rank is None or 1 <= self.rank <= self.r,
            f"rank is from 1 to r={self.r}, not {self.rank}",
        )


class Truncated(LowRank):
    """``s B[:, :q] A[:q] x``; while training, q is drawn from 1 to the rank in use."""

    def __init__(self, site: Site, config: DyLoRAConfig) -> None:
        super().__init__(site, config)
        self.rank = config.rank or config.r

    def forward(self, z: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        q = int(torch.randint(1, self.rank + 1, ())) if self.training else self.rank
        return F.linear(F.linear(z, self.A[:q]), self.B[:, :q]) * self.scale

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``W + s B A`` of the rank in use."""
        q = self.rank
        return weight + self.B[:, :q] @ self.A[:q] * self.scale, bias


class DyLoRATuner(Tuner):
    """LoRA that can be cut to any smaller rank after training."""

    branch = Truncated
    info = MethodInfo(
        name="dylora",
        summary="LoRA that can be cut to any smaller rank after training.",
        family="reparameterised",
        leaf="low rank",
        paper="DyLoRA (Valipour et al. 2023), arXiv:2210.07558",
        config=DyLoRAConfig,
        source="anabranch",
        size=Size("r"),
        mixed_batch=True,
        engine="batched",
    )


@dataclass
class SoRAConfig(RankedConfig):
    """Options of SoRA."""

    method: ClassVar[str] = "sora"


class Gated(LowRank):
    """``s B (g * (A x))``."""

    def __init__(self, site: Site, config: SoRAConfig) -> None:
        super().__init__(site, config)
        self.gate = nn.Parameter(torch.ones(config.r))

    def forward(self, z: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return F.linear(F.linear(z, self.A) * self.gate, self.B) * self.scale

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``W + s B diag(g) A``."""
        return weight + (self.B * self.gate) @ self.A * self.scale, bias


class SoRATuner(Tuner):
    """LoRA with a sparse gate on its ranks."""

    branch = Gated
    info = MethodInfo(
        name="sora",
        summary="LoRA with a gate that prunes ranks while training.",
        family="reparameterised",
        leaf="rank search",
        paper="SoRA (Ding et al. 2023), arXiv:2311.11696",
        config=SoRAConfig,
        source="anabranch",
        size=Size("r"),
        mixed_batch=True,
        engine="batched",
    )


def truncate(model: nn.Module, rank: int, adapter: str = "default") -> None:
    """Use only the first ``rank`` ranks of a DyLoRA adapter; stored with the configuration."""
    found = [branch for branch in _branches(model, adapter) if isinstance(branch, Truncated)]
    if not found:
        raise AdapterError(f"the model has no dylora adapter {adapter!r}")
    config: Any = getattr(model, "peft_config", {})[adapter]
    if not 1 <= rank <= config.r:
        raise AdapterError(f"dylora: rank is from 1 to r={config.r}, not {rank}")
    config.rank = rank
    for branch in found:
        branch.rank = rank


@torch.no_grad()
def shrink_gates(model: nn.Module, amount: float, adapter: str = "default") -> int:
    """SoRA's proximal step, after each optimiser step: ``g <- sign(g) max(|g| - amount, 0)``.

    ``amount`` is learning rate times the strength of the penalty. Returns how many gates are left.
    """
    found = [branch for branch in _branches(model, adapter) if isinstance(branch, Gated)]
    if not found:
        raise AdapterError(f"the model has no sora adapter {adapter!r}")
    if amount < 0:
        raise AdapterError(f"sora: gates shrink by an amount from 0, not {amount}")
    for branch in found:
        branch.gate.copy_(F.softshrink(branch.gate, amount))
    return sum(int(branch.gate.count_nonzero()) for branch in found)


def _branches(model: nn.Module, adapter: str) -> Iterator[nn.Module]:
    for layer in model.modules():
        if isinstance(layer, AdaptedLayer) and adapter in layer.branches:
            yield layer.branches[adapter]


DyLoRATuner.enlist()
SoRATuner.enlist()
