"""Runs Llama-shaped models on a CPU with few, large operations.

Projections that read the same input are one matrix, weights stay bfloat16 or int8 in memory and are
multiplied in single precision or exactly in integers, attention walks the pages of the cache, and
only wanted rows reach the head. A row's result does not depend on the other rows of a step: the
same request gives the same bits in any batch and for any split of its prompt.

Any number of LoRA adapters share a batch. Not known here: other kinds of adapters, and models that
are not Llama-shaped; the :class:`~anabranch.serving.runner.transformers.TransformersRunner` serves
those.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel

from anabranch.errors import AdapterError, ConfigurationError, ModelUnsupported
from anabranch.serving import kernels
from anabranch.serving.adapters import AdapterCheckpoint, LowRank
from anabranch.serving.adapters.checkpoint import low_rank_layers, why_not_low_rank
from anabranch.serving.batch import PackedBatch, PageCopy, StepPlan, StepResult, pack
from anabranch.serving.kernels.reference import GROUP, TILE, unpack_bfloat16, unpack_int8
from anabranch.serving.options import CacheFormat, WeightFormat
from anabranch.serving.runner import paged_attention
from anabranch.serving.runner.branch import branch_of
from anabranch.serving.runner.frozen import FrozenLinear
from anabranch.serving.runner.lora import FusedAdapter, LoraBatch, Site
from anabranch.serving.runner.memory import zeros
from anabranch.serving.runner.probe import num_pages, probe_plans, probe_prompt
from anabranch.serving.runner.recording import Recording, recordings
from anabranch.serving.sequence import Request, Segment
from anabranch.serving.sequence import Sequence as TokenSequence

logger = logging.getLogger(__name__)

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)


class FusedRunner:
    """Takes the weights of a loaded model; the model itself can be dropped afterwards.

    ``weights`` is how they are kept: ``bf16`` (16 bits, exact for a bfloat16 model) or ``int8`` (a
    scale for each output row). ``kv_cache`` is as in :class:`EngineOptions`. Raises
    :class:`ModelUnsupported` for anything it would not compute as the model does.
    """

    shared_inputs: Sequence[tuple[str, ...]] = (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("mlp.gate_proj", "mlp.up_proj"),
    )

    def __init__(
        self,
        model: PreTrainedModel,
        context_length: int,
        page_size: int = 32,
        weights: WeightFormat = "bf16",
        kv_cache: CacheFormat = "auto",
    ) -> None:
        reason = unsuitable(model, page_size, weights)
        if reason:
            raise ModelUnsupported(f"{_name(model)} does not fit the fused runner: {reason}")
        config, base = model.config, cast(Any, model.base_model)
        self.page_size = page_size
        self.context_length = context_length
        self.vocabulary = model.get_output_embeddings().weight.shape[0]
        self.weights = weights
        self._ops = replace(kernels.load())  # a copy of our own, see operations_replaced
        self._heads = config.num_attention_heads
        self._kv_heads = config.num_key_value_heads
        self._head_dim = _head_dim(model)
        self._eps = float(config.rms_norm_eps)
        self._window = _window(config)
        self._rotary = base.rotary_emb
        embedding = cast(nn.Embedding, model.get_input_embeddings())
        self._embedding = embedding.weight.detach().bfloat16()
        self._final_norm = base.norm.weight.detach().float()
        with torch.inference_mode():
            self._head = PackedLinear.of([model.get_output_embeddings()], weights, self._ops)
            self._layers = [self._pack_layer(layer) for layer in base.layers]
        self._sites = list(_sites(model))
        self._template = self._make_template(model)
        self._lora: LoraBatch | None = None
        self._recordings: list[Recording] = []
        exact = model.dtype == torch.float32 and weights == "bf16"
        single = exact if kv_cache == "auto" else kv_cache == "fp32"
        self._cache_dtype = torch.float32 if single else torch.bfloat16
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        element = self._cache_dtype.itemsize
        self.page_bytes = (
            2 * len(self._layers) * self._kv_heads * self._head_dim * page_size * element
        )
        self._probe(model)

    def allocate(self, num_pages: int) -> None:
        """Create zeroed caches; see ``kernels.reference.attention`` for their layout."""
        shape = self._kv_heads, num_pages
        dim, page = self._head_dim, self.page_size
        device = torch.device("cpu")
        layers = range(len(self._layers))
        self._keys = [zeros((*shape, dim, page), self._cache_dtype, device) for _ in layers]
        self._values = [zeros((*shape, page, dim), self._cache_dtype, device) for _ in layers]

    def add_adapter(self, checkpoint: AdapterCheckpoint) -> tuple[FusedAdapter, int]:
        """Keep a LoRA adapter beside the weights, in the number format of the cache."""
        reason = checkpoint.not_low_rank
        if reason:
            raise AdapterError(
                f"{checkpoint.folder} cannot share a batch: {reason}; serve it with "
                f"runner=transformers, or merge it into the model"
            )
        adapter = self._pack_adapter(checkpoint.low_rank(), str(checkpoint.folder))
        return adapter, adapter.memory

    def remove_adapter(self, handle: FusedAdapter) -> None:
        """Nothing but the last batch still holds it."""
        self._lora = None

    def first_layers(self, layers: int) -> FusedRunner:
        """Shares everything. Call it once the caches are there."""
        if not 1 <= layers < len(self._layers):
            raise ConfigurationError(
                f"the draft layers must be between 1 and {len(self._layers) - 1}, not {layers}"
            )
        runner = copy.copy(self)
        runner._layers = self._layers[:layers]
        return runner

    def training_base(self) -> PreTrainedModel:
        """The model's modules, with the packed weights in place of their own."""
        if self._template is None:
            raise AdapterError(
                f"this model cannot be trained while it serves: the outputs of its linear layers "
                f"are not multiples of {TILE}; use runner=transformers or `anabranch finetune`"
            )
        return branch_of(self._template)

    def training_handle(self, model: PeftModel) -> FusedAdapter:
        """The adapter's matrices as they are now, packed."""
        config = model.active_peft_config
        values = {**config.to_dict(), "peft_type": config.peft_type.value}
        tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
        reason = why_not_low_rank(values, tensors)
        if reason:
            raise AdapterError(
                f"an adapter of this kind cannot be trained on the fused runner: {reason}; "
                f"serve with --runner transformers, or use `anabranch finetune`"
            )
        return self._pack_adapter(low_rank_layers(values, tensors, "the adapter"), "the adapter")

    def read_cache(self, layer: int, pages: Sequence[int], tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[kv_heads, tokens, head_dim]``, float32."""
        index = torch.tensor(pages[: -(-tokens // self.page_size)])
        keys = self._keys[layer][:, index].transpose(2, 3).flatten(1, 2)
        values = self._values[layer][:, index].flatten(1, 2)
        return keys[:, :tokens].float(), values[:, :tokens].float()

    @property
    def cache_dtype(self) -> torch.dtype:
        """float32 or bfloat16."""
        return self._cache_dtype

    def copy_pages(self, copies: Sequence[PageCopy]) -> None:
        """Copy keys and values in every layer."""
        sources, targets = (list(pages) for pages in zip(*copies, strict=True))
        for cache in (*self._keys, *self._values):
            cache[:, targets] = cache[:, sources]

    def clear_pages(self, pages: Sequence[int]) -> None:
        """Zero the keys and values of pages."""
        for cache in (*self._keys, *self._values):
            cache[:, list(pages)] = 0

    def move_slots(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy the keys and values of tokens in every layer."""
        page, offset = np.divmod(sources, self.page_size)
        to_page, to_offset = np.divmod(targets, self.page_size)
        for keys, values in zip(self._keys, self._values, strict=True):
            keys[:, to_page, :, to_offset] = keys[:, page, :, offset]
            values[:, to_page, to_offset] = values[:, page, offset]

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Run the packed batch, pool what wants pooling and record what is trained on."""
        batch = plan.pack()
        self._lora = LoraBatch.of(plan.segments, batch.query_start, self._lora)
        self._recordings = list(recordings(plan.segments, batch.query_start))
        hidden = self._hidden_states(batch)
        logits = self._head(hidden[batch.logits_index])
        pooled = {
            index: hidden[batch.query_start[index] : batch.query_start[index + 1]].sum(dim=0)
            for index, segment in enumerate(plan.segments)
            if segment.sequence.request.pooling
        }
        return StepResult(logits, pooled)

    @torch.inference_mode()
    def all_logits(self, tokens: Sequence[int]) -> Tensor:
        """Logits ``[tokens, vocabulary]`` after every token of a text, for measuring quality.

        Uses the first pages of the cache: only for a runner that no engine has.
        """
        pages = list(range(num_pages(list(tokens), self.page_size)))
        if not self._keys:
            self.allocate(-(-self.context_length // self.page_size))
        sequence = TokenSequence(Request("text", tokens), 0, list(tokens), 1, pages=pages)
        segment = Segment(sequence, 0, len(tokens))
        self._lora, self._recordings = None, []
        return self._head(self._hidden_states(pack((segment,), self.page_size)))

    @property
    def weight_elements(self) -> tuple[int, int]:
        """Weights of all layers, and of the head, as the kernels read them."""
        layers = sum(
            linear.packed.numel()
            for layer in self._layers
            for linear in (layer.qkv, layer.output, layer.gate_up, layer.down)
        )
        return layers, self._head.packed.numel()

    @property
    def attention_width(self) -> int:
        """Channels of all query heads in all layers: multiply-adds per query and key, halved."""
        return len(self._layers) * self._heads * self._head_dim

    @contextmanager
    def operations_replaced(
        self, wrap: Callable[[str, Callable[..., Any]], Callable[..., Any]]
    ) -> Iterator[None]:
        """Run with every kernel wrapped, to measure it: ``wrap(name, function)``."""
        original = {name: run for name, run in vars(self._ops).items() if callable(run)}
        vars(self._ops).update({name: wrap(name, run) for name, run in original.items()})
        try:
            yield
        finally:
            vars(self._ops).update(original)

    def _hidden_states(self, batch: PackedBatch) -> Tensor:
        """Normalised output of the last layer ``[N, hidden]``."""
        ops, eps = self._ops, self._eps
        x = self._embedding[batch.input_ids].float()
        cosine, sine = self._rotary(x[None], position_ids=batch.positions[None])
        where = (
            batch.slots,
            torch.from_numpy(batch.query_start),
            torch.from_numpy(batch.context),
            torch.from_numpy(batch.block_tables),
            *(batch.trees or (None, None)),
        )
        delta = None
        for index, layer in enumerate(self._layers):
            normed = ops.add_rms_norm(x, delta, layer.attention_norm, eps)
            self._record_inputs(index, x)
            attended = ops.attention(
                self._adapted(layer.qkv, normed, 4 * index),
                cosine[0].float(),
                sine[0].float(),
                self._keys[index],
                self._values[index],
                *where,
                self._heads,
                layer.scaling,
                self._window,
                layer.q_norm,
                layer.k_norm,
                eps,
            )
            delta = self._adapted(layer.output, attended, 4 * index + 1)
            normed = ops.add_rms_norm(x, delta, layer.mlp_norm, eps)
            gated = ops.silu_mul(self._adapted(layer.gate_up, normed, 4 * index + 2))
            delta = self._adapted(layer.down, gated, 4 * index + 3)
        normed = ops.add_rms_norm(x, delta, self._final_norm, eps)
        self._record_inputs(len(self._layers), x)
        return normed

    def _adapted(self, linear: PackedLinear, x: Tensor, site: int) -> Tensor:
        y, lora = linear(x), self._lora
        if self._recordings:
            x = self._record_products(x, y, site)
        if lora is not None:
            offsets = self._sites[site].offsets
            self._ops.add_lora(y, x, lora.blocks, lora.a[site], lora.b[site], offsets)
        return y

    def _record_inputs(self, layer: int, x: Tensor) -> None:
        for recording in self._recordings:
            recording.recorder.layer_input(layer, recording.start, x[recording.rows])

    def _record_products(self, x: Tensor, y: Tensor, number: int) -> Tensor:
        """Record a site's outputs; its inputs as an adapter sees them."""
        site, layer = self._sites[number], number // 4
        seen = x
        for recorder, start, rows in self._recordings:
            for name, offset, width in zip(site.names, site.offsets, site.widths, strict=True):
                if name in recorder.products:
                    recorder.product(layer, name, start, y[rows, offset : offset + width])
            if recorder.drops:
                seen = x.clone() if seen is x else seen
                seen[rows] = recorder.dropped(layer, site.names[0], start, x[rows])
        return seen

    def _pack_adapter(self, layers: Mapping[str, LowRank], where: str) -> FusedAdapter:
        return FusedAdapter.pack(layers, self._sites, self._cache_dtype, where)

    def _make_template(self, model: PreTrainedModel) -> PreTrainedModel | None:
        """The model's modules without its weights; None if they cannot be cut out of the packed."""
        template = branch_of(model)
        packed = {}
        for number, layer in enumerate(self._layers):
            for place, linear in enumerate((layer.qkv, layer.output, layer.gate_up, layer.down)):
                site = self._sites[4 * number + place]
                for name, start, width in zip(site.modules, site.offsets, site.widths, strict=True):
                    if start % TILE or width % TILE:
                        return None
                    packed[name] = linear.part(start, width)
        for name, part in packed.items():
            template.set_submodule(name, part.module())
        template.set_output_embeddings(self._head.module())
        for parameter in template.parameters():
            parameter.data = parameter.data.float()  # norms: what the kernels compute in
        embedding = cast(nn.Embedding, template.get_input_embeddings())
        embedding.weight = nn.Parameter(self._embedding, requires_grad=False)
        template.set_attn_implementation(paged_attention.NAME)
        return template.eval().requires_grad_(False)

    def _pack_layer(self, layer: Any) -> FusedLayer:
        attention, mlp = layer.self_attn, layer.mlp

        def packed(*linears: nn.Linear) -> PackedLinear:
            return PackedLinear.of(linears, self.weights, self._ops)

        def norm(name: str) -> Tensor | None:
            module = getattr(attention, name, None)
            return None if module is None else module.weight.detach().float()

        return FusedLayer(
            attention_norm=layer.input_layernorm.weight.detach().float(),
            qkv=packed(attention.q_proj, attention.k_proj, attention.v_proj),
            q_norm=norm("q_norm"),
            k_norm=norm("k_norm"),
            scaling=float(attention.scaling),
            output=packed(attention.o_proj),
            mlp_norm=layer.post_attention_layernorm.weight.detach().float(),
            gate_up=packed(mlp.gate_proj, mlp.up_proj),
            down=packed(mlp.down_proj),
        )

    def _probe(self, model: PreTrainedModel) -> None:
        """Prove on a short prompt, in two pieces, that the packed weights compute the same."""
        prompt = probe_prompt(model, self.page_size)
        with torch.inference_mode():
            expected = (
                model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, -1].float()
            )
        self.allocate(num_pages(prompt, self.page_size))
        *_, result = map(self.execute, probe_plans(prompt, self.page_size))
        self._keys, self._values = [], []
        # Relative to the spread of the logits. Eight bits are not exact: their quality is
        # measured elsewhere, this only finds a wrong layout or a missing term.
        difference = float((result.logits[0] - expected).abs().max() / expected.std())
        exact = model.dtype == torch.float32 and self._cache_dtype == torch.float32
        tolerance = 1.5 if self.weights == "int8" else 0.01 if exact else 0.5
        if not difference <= tolerance:
            raise ModelUnsupported(
                f"{_name(model)} does not fit the fused runner: its logits differ by "
                f"{difference:.2g} standard deviations from the model's own"
            )


@dataclass(frozen=True)
class PackedLinear:
    """A linear layer, or several that share their input, in the kernels' layout."""

    packed: Tensor
    scale: Tensor | None
    bias: Tensor | None
    width: int
    ops: kernels.Operations

    @classmethod
    def of(
        cls, linears: Sequence[Any], weights: WeightFormat, ops: kernels.Operations
    ) -> PackedLinear:
        """Stack ``[O, K]`` weights and pad the outputs to whole tiles."""
        weight = torch.cat([linear.weight.detach() for linear in linears]).float()
        width = len(weight)
        padding = -width % TILE
        bias = None
        if getattr(linears[0], "bias", None) is not None:
            bias = torch.cat([linear.bias.detach() for linear in linears]).float()
            bias = nn.functional.pad(bias, (0, padding))
        weight = nn.functional.pad(weight, (0, 0, 0, padding))
        if weights == "bf16":
            tiles = weight.bfloat16().unflatten(0, (-1, 2, TILE // 2)).permute(0, 3, 2, 1)
            return cls(tiles.contiguous(), None, bias, width, ops)
        scale = weight.abs().amax(dim=1).clamp_min(1e-12) / 127
        integers = (weight / scale[:, None]).round() + 128
        tiles = integers.to(torch.uint8).view(len(weight) // TILE, TILE, -1, 4).transpose(1, 2)
        return cls(tiles.contiguous(), scale, bias, width, ops)

    def part(self, start: int, width: int) -> PackedLinear:
        """Outputs ``[start, start + width)``, multiples of a tile, around the same memory."""
        tiles = slice(start // TILE, (start + width) // TILE)
        rows = slice(start, start + width)
        scale = None if self.scale is None else self.scale[rows]
        bias = None if self.bias is None else self.bias[rows]
        return PackedLinear(self.packed[tiles], scale, bias, width, self.ops)

    def module(self) -> FrozenLinear:
        """The same as a module that passes gradients on."""
        return FrozenLinear(self.inputs, self.width, self, self.transposed, self.dense, self.bias)

    def dense(self) -> Tensor:
        """The weight ``[O, K]`` in float32."""
        if self.scale is None:
            return unpack_bfloat16(self.packed)[: self.width]
        return unpack_int8(self.packed, self.scale)[: self.width]

    def transposed(self, y: Tensor) -> Tensor:
        """``[N, O] -> [N, K]`` by the transpose of the weight: a gradient on its way back."""
        y = y.contiguous()
        if self.scale is None:
            return self.ops.transposed_bfloat16(y, self.packed)
        return self.ops.transposed_int8(y, self.packed, self.scale)

    @property
    def inputs(self) -> int:
        """K."""
        return self.packed.shape[1] * (1 if self.scale is None else 4)

    def __call__(self, x: Tensor) -> Tensor:
        """``[N, K] -> [N, O]``."""
        if self.scale is None:
            y = self.ops.linear_bfloat16(x, self.packed, self.bias)
        else:
            y = self.ops.linear_int8(x, self.packed, self.scale, self.bias)
        return y if y.shape[1] == self.width else y[:, : self.width].contiguous()


@dataclass(frozen=True)
class FusedLayer:
    """Packed weights of one decoder layer."""

    attention_norm: Tensor
    qkv: PackedLinear
    q_norm: Tensor | None
    k_norm: Tensor | None
    scaling: float
    output: PackedLinear
    mlp_norm: Tensor
    gate_up: PackedLinear
    down: PackedLinear


def unsuitable(model: PreTrainedModel, page_size: int, weights: WeightFormat) -> str | None:
    """Why the fused runner cannot run this model, or None if it can."""
    config = model.config
    if model.device.type != "cpu":
        return "its kernels are for the CPU"
    if type(model).__name__ not in ARCHITECTURES:
        return f"it runs {', '.join(ARCHITECTURES)}"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}, not silu"
    if page_size % 16:
        return f"pages of {page_size} tokens are not a multiple of 16"
    if _head_dim(model) % 32:
        return f"heads of {_head_dim(model)} channels are not a multiple of 32"
    unit = GROUP if weights == "int8" else 16
    for name in ("hidden_size", "intermediate_size"):
        if getattr(config, name) % unit:
            return f"{name} {getattr(config, name)} is not a multiple of {unit}"
    if weights == "int8" and config.num_attention_heads * _head_dim(model) % GROUP:
        return f"its attention output is not a multiple of {GROUP} channels"
    if len(set(getattr(config, "layer_types", None) or ["full_attention"])) > 1:
        return "its layers attend in different ways"
    return None


def _sites(model: PreTrainedModel) -> Iterator[Site]:
    """The packed linear layers in the order in which a step reads them, four for each layer."""
    qkv, gate_up = FusedRunner.shared_inputs
    groups = (qkv, ("self_attn.o_proj",), gate_up, ("mlp.down_proj",))
    layers = f"{model.base_model_prefix}.layers"
    for number, layer in enumerate(cast(Any, model.base_model).layers):
        for group in groups:
            linears = [layer.get_submodule(name) for name in group]
            yield Site(
                tuple(f"{layers}.{number}.{name}" for name in group),
                group,
                linears[0].in_features,
                tuple(linear.out_features for linear in linears),
            )


def _name(model: PreTrainedModel) -> str:
    return type(model).__name__


def _head_dim(model: PreTrainedModel) -> int:
    config = model.config
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _window(config: Any) -> int:
    """Tokens that a query sees, itself included; 0 for all."""
    if not getattr(config, "use_sliding_window", True):
        return 0
    if set(getattr(config, "layer_types", None) or []) == {"full_attention"}:
        return 0
    return getattr(config, "sliding_window", None) or 0
