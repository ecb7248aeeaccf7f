"""An adapter in training on the weights that serve."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from anabranch import adapters
from anabranch.errors import AdapterError
from anabranch.serving.coserving.dropout import AdapterDropout, ReplayedDropout
from anabranch.serving.coserving.job import FinetuneJob
from anabranch.serving.coserving.pack import Pack
from anabranch.serving.runner import DifferentiableRunner
from anabranch.serving.runner.frozen import frozen_linears, made_once
from anabranch.serving.runner.trunk import Trunk
from anabranch.training.randomness import separate_randomness


class Trainee:
    """The adapter of one job: PEFT's modules around the runner's weights.

    Raises :class:`AdapterError` for what cannot be trained by windows: soft prompts, weights of the
    base itself, and modules outside the decoder layers.
    """

    def __init__(self, runner: DifferentiableRunner, job: FinetuneJob) -> None:
        base = runner.training_base()
        self.trunk = Trunk.of(base)
        own_dropout = {id(m) for m in base.modules() if isinstance(m, nn.Dropout)}
        self.model = _adapted(base, job)
        self.parameters = _parameters_by_layer(self.model, self.trunk)
        self.lowest = min(layer for layer, own in enumerate(self.parameters) if own)
        """Nothing below this layer takes gradients."""
        self.dropout = _replay_dropout(self.trunk, runner, job.options.seed, own_dropout)
        self.model.eval()  # dropout of the base is not part of what is served
        self._linears = [dict(frozen_linears(layer)) for layer in self.trunk.layers]
        # The last one's output is a part of the next layer's input, and only that.
        self.products = frozenset([*self._linears[0]][:-1] if job.activations == "pruned" else ())
        """Linear layers whose outputs are kept from the forward pass instead of computed again."""
        self.hidden = int(base.config.get_text_config().hidden_size)
        self._runner = runner
        self.handle = runner.training_handle(self.model)
        """With which the engine computes segments on the weights as they are now."""

    def refresh(self) -> None:
        """The weights have changed."""
        self.handle = self._runner.training_handle(self.model)

    @contextmanager
    def replaying(self, pack: Pack, layer: int, start: int, stop: int) -> Iterator[None]:
        """Compute rows of a pack as they were served: kept products, the same dropout."""
        linears = self._linears[layer]
        kept = {name: rows for (at, name), rows in pack.outputs.items() if at == layer}
        if self.dropout is not None:
            self.dropout.first_row = start
        for name, rows in kept.items():
            linears[name].replay = rows[start:stop]
        try:
            yield
        finally:
            for name in kept:
                linears[name].replay = None


def _adapted(base: PreTrainedModel, job: FinetuneJob) -> PeftModel:
    with separate_randomness(job.options.seed), made_once():
        if job.start_from is not None:
            model = adapters.load(base, job.start_from, trainable=True)
        else:
            model = adapters.build(job.method, base, **job.method_options)
    if model.active_peft_config.is_prompt_learning:
        raise AdapterError(
            f"{job.method} adds virtual tokens, which cannot be trained while the model serves; "
            f"use `anabranch finetune`"
        )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def _parameters_by_layer(model: PeftModel, trunk: Trunk) -> list[list[nn.Parameter]]:
    """Trainable parameters of each decoder layer."""
    by_layer = [
        [parameter for parameter in layer.parameters() if parameter.requires_grad]
        for layer in trunk.layers
    ]
    inside = {id(parameter) for own in by_layer for parameter in own}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in inside:
            raise AdapterError(
                f"{name} lies outside the decoder layers and cannot be trained while the model "
                f"serves; leave it out of target_modules, or use `anabranch finetune`"
            )
    return by_layer


def _replay_dropout(
    trunk: Trunk, runner: DifferentiableRunner, seed: int, known: set[int]
) -> AdapterDropout | None:
    """Replace the dropout modules of LoRA; None if there are none that drop anything."""
    shared = {name: group[0] for group in runner.shared_inputs for name in group}
    dropout: AdapterDropout | None = None
    for number, layer in enumerate(trunk.layers):
        for name, module in list(layer.named_modules()):
            at = re.fullmatch(r"(.+)\.lora_dropout\.[^.]+", name)
            if not isinstance(module, nn.Dropout) or not module.p or id(module) in known:
                continue
            if at is None:
                raise AdapterError(
                    f"{name} drops values, which is only repeated exactly for LoRA; set the "
                    f"adapter's dropout to 0, or use `anabranch finetune`"
                )
            if dropout is None:
                dropout = AdapterDropout(module.p, seed, shared)
            if module.p != dropout.probability:
                raise AdapterError("an adapter trained while serving has one dropout probability")
            layer.set_submodule(name, ReplayedDropout(dropout, number, at[1]))
    return dropout
