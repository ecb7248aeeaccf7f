"""What the memory planner is told: a model's layer as numbers, and the bypass networks on it.

A layer is described by :class:`LayerShape`; Llama, Qwen3 (``qk_norm``) and OPT-like layers
(``mlp="relu"``, ``norm="layer"``) are values of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from anabranch.errors import ConfigurationError

Activation = Literal["silu", "gelu", "relu", "tanh", "identity"]
KNOWN_TYPES = ("llama", "mistral", "qwen2", "qwen3")
"""Models of transformers whose decoder layer is the graph's, tensor for tensor."""


@dataclass(frozen=True)
class Lora:
    """``y + s B A x`` at a linear module (Hu et al. 2021).

    ``dropout`` says that x passes through dropout first, with a mask of this module's own.
    """

    rank: int
    dropout: bool = False


@dataclass(frozen=True)
class Bottleneck:
    """``act``-bottleneck adapter (Houlsby et al. 2019; Hu et al., LLM-Adapters, 2023).

    ``series_output`` reads and adds to the module's output, ``parallel`` reads its input.
    """

    size: int
    activation: Activation = "tanh"
    place: Literal["series_output", "parallel"] = "series_output"


@dataclass(frozen=True)
class IA3:
    """A trained vector times the module's output, or its input (Liu et al. 2022)."""

    on: Literal["output", "input"] = "output"


@dataclass(frozen=True)
class TrainedBias:
    """A trained bias of a module whose weight is frozen (BitFit)."""


Bypass = Lora | Bottleneck | IA3 | TrainedBias


@dataclass(frozen=True)
class LayerShape:
    """A decoder-only model as the planner sees it. Widths count elements."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    vocabulary: int
    mlp: Literal["silu", "gelu", "relu"] = "silu"
    gated: bool = True
    """True: ``down(act(gate x) * up x)``; False: ``down(act(up x))``."""
    norm: Literal["rms", "layer"] = "rms"
    qk_norm: bool = False
    rope: bool = True

    @classmethod
    def of(cls, config: Any) -> LayerShape:
        """From the Hugging Face config of a model in :data:`KNOWN_TYPES`.

        Raises :class:`ConfigurationError` for another model or activation.
        """
        if config.model_type not in KNOWN_TYPES:
            raise ConfigurationError(
                f"no layer graph for model_type={config.model_type!r}; known: "
                f"{', '.join(KNOWN_TYPES)}. Describe its layer by a LayerShape if it is like them"
            )
        if config.hidden_act not in ("silu", "gelu", "relu"):
            raise ConfigurationError(
                f"no backward rule for hidden_act={config.hidden_act!r}; known: silu, gelu, relu"
            )
        heads = config.num_attention_heads
        return cls(
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            layers=config.num_hidden_layers,
            vocabulary=config.vocab_size,
            mlp=config.hidden_act,
            qk_norm=config.model_type == "qwen3",
        )

    @property
    def modules(self) -> dict[str, tuple[int, int]]:
        """Linear modules that can be adapted: name -> (in, out)."""
        query, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        gate = {"gate_proj": (self.hidden, self.intermediate)} if self.gated else {}
        return {
            "q_proj": (self.hidden, query),
            "k_proj": (self.hidden, kv),
            "v_proj": (self.hidden, kv),
            "o_proj": (query, self.hidden),
            **gate,
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }
