"""Bottleneck adapters: LLM-Adapters' series and parallel ones (Hu et al. 2023, section 3.1).

B(z) = s * U(act(D(dropout(z))))        D: d -> b, U: b -> d', without bias

series_input     W(x + B(x))
series_output    y + B(y), y = W x
parallel         W x + B(x)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.adapters.base import AdapterConfig, Branch, Place, Site, Tuner
from anabranch.adapters.errors import NotMergeable
from anabranch.adapters.info import MethodInfo, Size

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "identity": lambda z: z,
}
PLACES: dict[str, Place] = {
    "series_input": "input",
    "series_output": "output",
    "parallel": "parallel",
}
SITES: dict[str, Sequence[str]] = {
    "series_input": ["mlp-input"],
    "series_output": ["mlp-output"],
    "parallel": ["mlp-input", "mlp-output"],
}
"""Where the paper puts each: series around the feed-forward block, parallel inside it."""


@dataclass
class BottleneckConfig(AdapterConfig):
    """Options of a bottleneck adapter."""

    bottleneck_size: int = field(default=256, metadata={"help": "Width b."})
    placement: Literal["series_input", "series_output", "parallel"] = field(
        default="series_output", metadata={"help": "See anabranch.adapters.bottleneck."}
    )
    activation: Literal["tanh", "relu", "gelu", "silu", "identity"] = field(
        default="tanh", metadata={"help": "Between down and up; with identity it can be merged."}
    )
    scaling: float | Literal["learned"] = field(
        default=1.0, metadata={"help": "Factor s, or 'learned': a trained scalar that starts at 1."}
    )
    dropout: float = field(default=0.0, metadata={"help": "Of the input, while training."})
    init: Literal["zero", "bert"] = field(
        default="zero",
        metadata={"help": "zero: the model starts as its base; bert: both N(0, 0.02)."},
    )
    method: ClassVar[str] = "bottleneck"

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, choices in (
            ("placement", PLACES),
            ("activation", ACTIVATIONS),
            ("init", ("zero", "bert")),
        ):
            value = getattr(self, option)
            self.require(
                value in choices, f"{option} is one of {', '.join(choices)}, not {value!r}"
            )
        self.require(
            self.bottleneck_size >= 1, f"bottleneck_size is at least 1, not {self.bottleneck_size}"
        )
        self.require(0 <= self.dropout < 1, f"dropout is in [0, 1), not {self.dropout}")
        self.require(
            self.scaling == "learned" or not isinstance(self.scaling, str),
            f"scaling is a number or 'learned', not {self.scaling!r}",
        )


class Bottleneck(Branch):
    """``s * U(act(D z))`` in one of the three places."""

    def __init__(self, site: Site, config: BottleneckConfig) -> None:
        super().__init__(site, config)
        self.place = PLACES[config.placement]
        self.activation = config.activation
        self.dropout = config.dropout
        width = site.out_features if self.place == "output" else site.in_features
        into = site.in_features if self.place == "input" else site.out_features
        self.down = nn.Parameter(torch.empty(config.bottleneck_size, width))
        self.up = nn.Parameter(torch.empty(into, config.bottleneck_size))
        self.scale: Tensor | float
        if isinstance(config.scaling, str):
            self.scale = nn.Parameter(torch.ones(()))
        else:
            self.scale = config.scaling
        if config.init == "bert":
            nn.init.normal_(self.down, std=0.02)
            nn.init.normal_(self.up, std=0.02)
        else:
            nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
            nn.init.zeros_(self.up)

    def forward(self, z: Tensor) -> Tensor:
        """[..., d] -> [..., d'], plus z itself where the branch is in series."""
        hidden = F.linear(F.dropout(z, self.dropout, self.training), self.down)  # [..., b]
        out = F.linear(ACTIVATIONS[self.activation](hidden), self.up) * self.scale
        return out if self.place == "parallel" else z + out

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``s U D`` into the weight; :class:`NotMergeable` unless the activation is identity."""
        if self.activation != "identity":
            raise NotMergeable(_NONLINEAR.format(self.activation))
        product = (self.up @ self.down) * self.scale
        if self.place == "parallel":
            return weight + product, bias
        if self.place == "input":
            return weight + weight @ product, bias
        return weight + product @ weight, None if bias is None else bias + product @ bias


_NONLINEAR = (
    "a bottleneck with activation {} is not linear, so no weight does the same; "
    "train it with activation='identity' to merge it"
)


class BottleneckTuner(Tuner):
    """Series and parallel adapters: two small linear maps with a nonlinearity between them."""

    branch = Bottleneck
    info = MethodInfo(
        name="bottleneck",
        summary="Series or parallel bottleneck adapter around or beside linear modules.",
        family="additive",
        leaf="adapter",
        paper="LLM-Adapters (Hu et al. 2023), arXiv:2304.01933",
        config=BottleneckConfig,
        source="anabranch",
        targets=("mlp-output",),
        size=Size("bottleneck_size"),
        mergeable=False,
        merge_note="its activation is not linear; with activation='identity' it can be merged",
        mixed_batch=True,
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "houlsby": {
            "placement": "series_output",
            "target_modules": ("attention-output", "mlp-output"),
        },
        "pfeiffer": {"placement": "series_output", "target_modules": ("mlp-output",)},
        "series_input": {"placement": "series_input", "target_modules": ("mlp-input",)},
        "parallel": {"placement": "parallel", "target_modules": ("mlp-input", "mlp-output")},
        "scaled_parallel": {
            "placement": "parallel",
            "target_modules": ("mlp-input", "mlp-output"),
            "scaling": 4.0,
        },
    }

    @classmethod
    def merge_obstacle(cls, config: BottleneckConfig) -> str:
        """The activation, unless it is the identity."""
        return "" if config.activation == "identity" else _NONLINEAR.format(config.activation)

    def default_targets(self, config: BottleneckConfig) -> Sequence[str]:
        """The paper's sites for the placement."""
        return SITES[config.placement]


BottleneckTuner.enlist()
