"""Runs any Hugging Face causal language model whose attention goes through ``AttentionInterface``.

The model's own layers compute everything but attention. Whether that is exact is not assumed from
a list of architectures: on construction a short prompt is computed twice, once by the model's own
attention and once in two pieces through the paged cache, and the model is refused if the two
differ. Tested with transformers 5.23.

An adapter is a branch of the model: PEFT's own modules around the same weights, so every method
that lives inside the layers can be served. The segments of each branch are computed on their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from anabranch.errors import AdapterError, ModelUnsupported
from anabranch.serving.adapters import AdapterCheckpoint
from anabranch.serving.batch import PackedBatch, PageCopy, StepPlan, StepResult
from anabranch.serving.runner import paged_attention
from anabranch.serving.runner.branch import branch_of, freeze_linears
from anabranch.serving.runner.frozen import frozen_linears
from anabranch.serving.runner.memory import zeros
from anabranch.serving.runner.paged_attention import LayerCache
from anabranch.serving.runner.probe import num_pages, probe_plans, probe_prompt
from anabranch.serving.runner.recording import Recording, recordings
from anabranch.serving.runner.trunk import Trunk


class TransformersRunner:
    """Reference runner. Takes the model over: from now on it answers only through the engine.

    Raises :class:`ModelUnsupported` if the model's attention bypasses the interface or needs
    something that the paged attention does not compute.
    """

    def __init__(self, model: PreTrainedModel, context_length: int, page_size: int = 32) -> None:
        self.model = model.eval().requires_grad_(False)
        self.page_size = page_size
        self.vocabulary = model.get_output_embeddings().weight.shape[0]
        self.context_length = context_length
        self._device = model.device
        self._caches: list[LayerCache] = []
        self._shapes = _take_over(self.model, page_size)
        element = torch.finfo(model.dtype).bits // 8
        self.page_bytes = page_size * element * sum(h * (k + v) for h, k, v in self._shapes)

    def allocate(self, num_pages: int) -> None:
        """Create zeroed caches."""
        self._caches = _make_caches(
            self._shapes, num_pages, self.page_size, self.model.dtype, self._device
        )

    shared_inputs: Sequence[tuple[str, ...]] = ()

    def training_base(self) -> PreTrainedModel:
        """A branch whose linear layers are frozen."""
        base = branch_of(self.model)
        freeze_linears(base)
        Trunk.of(base)  # refuses models that cannot be trained layer by layer
        return base

    def training_handle(self, model: PeftModel) -> PreTrainedModel:
        """The adapted modules themselves."""
        return cast(PreTrainedModel, model.get_base_model())

    def read_cache(self, layer: int, pages: Sequence[int], tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[kv_heads, tokens, head_dim]``."""
        index = torch.tensor(pages[: -(-tokens // self.page_size)], device=self._device)
        keys, values = self._caches[layer].read(index, 1)
        return keys[0, :, :tokens], values[0, :, :tokens]

    @property
    def cache_dtype(self) -> torch.dtype:
        """The model's own."""
        return self.model.dtype

    def copy_pages(self, copies: Sequence[PageCopy]) -> None:
        """Copy keys and values in every layer."""
        sources, targets = (list(pages) for pages in zip(*copies, strict=True))
        for cache in self._caches:
            cache.keys[:, targets] = cache.keys[:, sources]
            cache.values[:, targets] = cache.values[:, sources]

    def add_adapter(self, checkpoint: AdapterCheckpoint) -> tuple[PreTrainedModel, int]:
        """Put a PEFT adapter of any method into a branch of the model, which shares its weights.

        Virtual tokens cannot be served: they are no part of the sequence that the engine counts.
        """
        import anabranch.adapters  # noqa: F401 - registers our own methods with PEFT

        folder = str(checkpoint.folder)
        try:
            config = PeftConfig.from_pretrained(folder)
        except (TypeError, ValueError, KeyError) as error:
            raise AdapterError(f"PEFT cannot read {folder}: {error}") from error
        if config.is_prompt_learning or checkpoint.method == "ADAPTION_PROMPT":
            raise AdapterError(
                f"{folder} cannot be served: {checkpoint.method} adds virtual tokens to the prompt"
            )
        branch = branch_of(self.model)
        try:
            PeftModel.from_pretrained(branch, folder)  # changes the branch in place
        except (RuntimeError, TypeError, ValueError, KeyError) as error:
            raise AdapterError(f"{folder} was made for another model: {error}") from error
        shared = {parameter.data_ptr() for parameter in self.model.parameters()}
        own = (p for p in branch.parameters() if p.data_ptr() not in shared)
        return branch.eval().requires_grad_(False), sum(p.nbytes for p in own)

    def remove_adapter(self, handle: PreTrainedModel) -> None:
        """Nothing else holds the branch."""

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Run the packed batch, once for each adapter in it, and pool what wants pooling."""
        groups: dict[PreTrainedModel, list[int]] = {}
        for index, segment in enumerate(plan.segments):
            adapter = segment.sequence.request.adapter
            groups.setdefault(adapter.handle if adapter else self.model, []).append(index)
        logits: dict[int, Tensor] = {}
        pooled: dict[int, Tensor] = {}
        for model, members in groups.items():
            segments = tuple(plan.segments[index] for index in members)
            result = self._execute(model, replace(plan, segments=segments))
            if len(groups) == 1:
                return result
            counts = [plan.segments[index].num_logits for index in members]
            logits |= zip(members, result.logits.split(counts), strict=True)
            pooled |= {members[index]: vector for index, vector in result.pooled.items()}
        return StepResult(torch.cat([logits[index] for index in sorted(logits)]), pooled)

    def _execute(self, model: PreTrainedModel, plan: StepPlan) -> StepResult:
        batch = plan.pack()
        pooling = [i for i, s in enumerate(plan.segments) if s.sequence.request.pooling]
        recorded = list(recordings(plan.segments, batch.query_start))
        with (
            _last_hidden_states(model, enabled=bool(pooling)) as hidden,
            _recorded(model, recorded),
        ):
            logits = _forward(model, batch, self.page_size, self._caches)
        pooled = {}
        for index in pooling:
            start, stop = batch.query_start[index], batch.query_start[index + 1]
            pooled[index] = hidden[0][0, start:stop].float().sum(dim=0)
        return StepResult(logits, pooled)

    def clear_pages(self, pages: Sequence[int]) -> None:
        """Zero the keys and values of pages."""
        for cache in self._caches:
            cache.keys[:, list(pages)] = 0
            cache.values[:, list(pages)] = 0

    def move_slots(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy the keys and values of tokens in every layer."""
        for cache in self._caches:
            for stored in (cache.keys.flatten(1, 2), cache.values.flatten(1, 2)):
                stored[:, list(targets)] = stored[:, list(sources)]


LayerShape = tuple[int, int, int]
"""Key heads, key dimension and value dimension of one layer."""


def _forward(
    model: PreTrainedModel, batch: PackedBatch, page_size: int, caches: list[LayerCache]
) -> Tensor:
    """Logits ``[R, vocabulary]`` of the wanted rows."""
    device = model.device
    plan = paged_attention.make_plan(batch, page_size, caches)
    output = model(
        input_ids=batch.input_ids[None].to(device),
        position_ids=batch.positions[None].to(device),
        use_cache=False,
        plan=plan,
        logits_to_keep=batch.logits_index.to(device),
    )
    return output.logits[0]


@contextmanager
def _last_hidden_states(model: PreTrainedModel, enabled: bool) -> Iterator[list[Tensor]]:
    """Collect the base model's output ``[1, tokens, hidden]`` while the head still runs."""
    collected: list[Tensor] = []
    if not enabled:
        yield collected
        return
    hook = model.base_model.register_forward_hook(
        lambda module, inputs, output: collected.append(output.last_hidden_state)
    )
    try:
        yield collected
    finally:
        hook.remove()


@contextmanager
def _recorded(model: PreTrainedModel, recorded: Sequence[Recording]) -> Iterator[None]:
    """Hand inputs of layers and outputs of linear layers to the recorders of some rows."""
    if not recorded:
        yield
        return
    trunk, hooks = Trunk.of(model), []
    recorded[0].recorder.begin(recorded[0].start)  # the others' rows come after it, in order

    def inputs_of(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            for recorder, start, rows in recorded:
                recorder.layer_input(number, start, hidden[0, rows])

        return hook

    def products_of(number: int, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            for recorder, start, rows in recorded:
                if name in recorder.products:
                    recorder.product(number, name, start, output[0, rows])

        return hook

    wanted = frozenset[str]().union(*(recorder.products for recorder, *_ in recorded))
    try:
        for number, layer in enumerate([*trunk.layers, trunk.norm]):
            hooks.append(layer.register_forward_pre_hook(inputs_of(number), with_kwargs=True))
            for name, linear in frozen_linears(layer):
                if name in wanted:
                    hooks.append(linear.register_forward_hook(products_of(number, name)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _take_over(model: PreTrainedModel, page_size: int) -> list[LayerShape]:
    """Switch a model to the paged attention and prove that it still computes the same."""
    name = type(model).__name__
    prompt = probe_prompt(model, page_size)
    tokens = torch.tensor([prompt], device=model.device)
    with torch.inference_mode():
        expected = model(input_ids=tokens, use_cache=False).logits[0, -1].float()
    try:
        shapes = _observe_layers(model, tokens)
        model.set_attn_implementation(paged_attention.NAME)
        actual = _probe(model, prompt, page_size, shapes).float()
    except Exception as error:
        raise ModelUnsupported(
            f"{name} cannot be served: its attention does not go through transformers' "
            f"AttentionInterface ({type(error).__name__}: {error}). Models of the Llama, Qwen, "
            "Mistral, Gemma, Phi, GPT-2, GPT-NeoX and OPT families can"
        ) from error
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    difference = (actual - expected).abs().max() / expected.abs().max()
    if not difference <= tolerance:  # also catches NaN
        raise ModelUnsupported(
            f"{name} cannot be served: through the paged cache its logits differ by "
            f"{difference:.1%} from its own attention, so it keeps state or biases (ALiBi, sinks, "
            "recurrence) that the engine does not compute"
        )
    return shapes


def _observe_layers(model: PreTrainedModel, tokens: Tensor) -> list[LayerShape]:
    """Run the model once with an attention that records the shapes each layer passes to it."""
    shapes: dict[int, LayerShape] = {}
    marker = object()

    def record(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: object, **kw: object
    ) -> tuple[Tensor, None]:
        if kw.get("plan") is not marker:
            raise RuntimeError("the attention does not pass on its keyword arguments")
        if kw.get("s_aux") is not None:
            raise RuntimeError("attention sinks are not supported")
        shapes[int(module.layer_idx)] = (key.shape[1], key.shape[3], value.shape[3])  # type: ignore[arg-type]
        # Only the shapes matter, so any output of the right shape will do.
        return value.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None

    recorder = f"{paged_attention.NAME}_recorder"
    AttentionInterface.register(recorder, record)
    model.set_attn_implementation(recorder)
    with torch.inference_mode():
        model(input_ids=tokens, use_cache=False, plan=marker)
    if not shapes:
        raise RuntimeError("the attention was never called")
    if sorted(shapes) != list(range(len(shapes))):
        raise RuntimeError(f"only layers {sorted(shapes)} call the attention")
    return [shapes[index] for index in range(len(shapes))]


def _probe(
    model: PreTrainedModel, prompt: list[int], page_size: int, shapes: list[LayerShape]
) -> Tensor:
    """Last logits ``[vocabulary]`` of a prompt computed through the cache."""
    pages = num_pages(prompt, page_size)
    caches = _make_caches(shapes, pages, page_size, model.dtype, model.device)
    with torch.inference_mode():
        for plan in probe_plans(prompt, page_size):
            logits = _forward(model, plan.pack(), page_size, caches)
    return logits[0]


def _make_caches(
    shapes: list[LayerShape], pages: int, page_size: int, dtype: torch.dtype, device: torch.device
) -> list[LayerCache]:
    return [
        LayerCache(
            zeros((heads, pages, page_size, key_dim), dtype, device),
            zeros((heads, pages, page_size, value_dim), dtype, device),
        )
        for heads, key_dim, value_dim in shapes
    ]
