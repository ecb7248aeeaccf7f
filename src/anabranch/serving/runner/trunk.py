"""The parts of a transformers language model that training by windows calls one by one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from anabranch.errors import AdapterError
from anabranch.serving.runner.paged_attention import AttentionPlan
from anabranch.training.head import Head


@dataclass(frozen=True)
class Trunk:
    """Decoder layers, rotary embedding, last norm and head of a model.

    Whether calling them in turn is what the model computes is not assumed from its name: the
    outputs of the first windows of a job are compared with what was served.
    """

    layers: nn.ModuleList
    rotary: nn.Module
    norm: nn.Module
    head: Head

    @classmethod
    def of(cls, model: PreTrainedModel) -> Trunk:
        """Find them; :class:`AdapterError` for a model that is built otherwise."""
        base = cast(Any, model.base_model)
        missing = [name for name in ("layers", "rotary_emb", "norm") if not hasattr(base, name)]
        if missing:
            raise AdapterError(
                f"{type(model).__name__} cannot be trained while it serves: it has no "
                f"{', '.join(missing)}; use `anabranch finetune`"
            )
        head = Head.of(model.get_output_embeddings(), model.config)
        return cls(base.layers, base.rotary_emb, base.norm, head)

    def layer(self, index: int, x: Tensor, positions: Tensor, plan: AttentionPlan) -> Tensor:
        """Output ``[N, hidden]`` of a layer for inputs ``[N, hidden]`` at positions ``[N]``."""
        rows, positions = x[None], positions[None]
        output = self.layers[index](
            rows,
            attention_mask=None,
            position_ids=positions,
            past_key_values=None,
            position_embeddings=self.rotary(rows, position_ids=positions),
            plan=plan,
        )
        return (output[0] if isinstance(output, tuple) else output)[0]
