from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from anabranch.adapters import build
from anabranch.errors import ConfigurationError, UnknownName
from anabranch.serving.coserving.ablation import (
    LLAMA_8B,
    LLAMA_70B,
    STEPS,
    ablation,
    ablation_markdown,
)
from anabranch.serving.coserving.layer_graph import LayerGraph, layer_graph
from anabranch.serving.coserving.layer_shape import (
    IA3,
    Bottleneck,
    Bypass,
    LayerShape,
    Lora,
    TrainedBias,
)
from anabranch.serving.coserving.pruning import (
    computable,
    needed_gradients,
    plan_activations,
    plan_layer,
    reads,
    redundant,
)

from .layer_executor import LayerExecutor, PlannedLayer, random_weights

DOCUMENT = Path(__file__).parents[3] / "docs" / "coserving.md"
LLAMA = LayerShape(
    hidden=24,
    intermediate=40,
    heads=6,
    kv_heads=2,
    head_dim=4,
    layers=3,
    vocabulary=50,
)
SHAPES = {
    "llama": LLAMA,
    "qwen3": replace(LLAMA, qk_norm=True),
    "opt": replace(LLAMA, mlp="relu", gated=False, norm="layer", rope=False, kv_heads=6),
    "gelu": replace(LLAMA, mlp="gelu", gated=False),
    "relu-gated": replace(LLAMA, mlp="relu"),
}
EVERY_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

bypasses = st.one_of(
    st.builds(Lora, st.integers(1, 6), st.booleans()),
    st.builds(
        Bottleneck,
        st.integers(1, 6),
        st.sampled_from(["tanh", "relu", "gelu", "silu", "identity"]),
        st.sampled_from(["series_output", "parallel"]),
    ),
    st.builds(IA3, st.sampled_from(["output", "input"])),
    st.just(TrainedBias()),
)
shapes = st.sampled_from(list(SHAPES.values()))


@st.composite
def cases(draw: Any) -> tuple[LayerShape, dict[str, Bypass]]:
    shape = draw(shapes)
    names = st.sampled_from(list(shape.modules))
    return shape, draw(st.dictionaries(names, bypasses, min_size=1))


# What PyTorch keeps


def network(attention: str = "sdpa", **options: Any) -> Any:
    tiny = {
        "hidden_size": 48,
        "intermediate_size": 100,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 200,
    }
    kind = options.pop("kind", LlamaConfig)
    config = kind(**(tiny | options), attn_implementation=attention)
    dtype = options.get("dtype", torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False)


def saved_bytes(model: Any, tokens: int) -> int:
    """Bytes that autograd saves for one sequence, without parameters; shared storage once."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, tuple[torch.Tensor, int]] = {}  # holds the tensors, so that no address returns

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (tensor, storage.nbytes())
        return tensor

    ids = torch.arange(tokens)[None] % 200
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids, labels=ids, use_cache=False)
    return sum(size for _, size in kept.values())


MID_SIZE = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4000,
}


@pytest.mark.parametrize("tokens", [1, 2, 11, 64])
@pytest.mark.parametrize("targets", [("down_proj",), ("q_proj", "v_proj"), EVERY_LINEAR])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("size", ["tiny", "mid"])
def test_autograd_is_what_pytorch_saves(size, attention, targets, tokens):
    model = network(attention, **(MID_SIZE if size == "mid" else {}))
    plan = plan_activations(
        model.config,
        dict.fromkeys(targets, Lora(5)),
        "autograd",
        tokens,
        bits=32,
        flash=attention == "sdpa",
    )
    adapted = get_peft_model(model, LoraConfig(r=5, target_modules=list(targets)))
    assert saved_bytes(adapted, tokens) == plan.bytes


@pytest.mark.parametrize(
    "options",
    [
        {"kind": Qwen3Config, "head_dim": 16},
        {"kind": Qwen2Config},
        {"kind": MistralConfig, "head_dim": 8},
        {"hidden_act": "relu"},
        {"hidden_act": "gelu"},
        {"attention_bias": True, "mlp_bias": True},
        {"num_key_value_heads": 6},
        {"num_hidden_layers": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_autograd_of_other_layers(options, attention):
    model = network(attention, **options)
    targets = {"o_proj": Lora(3), "down_proj": Lora(3)}
    plan = plan_activations(
        model.config, targets, "autograd", 9, bits=32, flash=attention == "sdpa"
    )
    adapted = get_peft_model(model, LoraConfig(r=3, target_modules=list(targets)))
    assert saved_bytes(adapted, 9) == plan.bytes


def test_autograd_of_dropout():
    model = network()
    targets = dict.fromkeys(("q_proj", "v_proj", "down_proj"), Lora(3, dropout=True))
    plan = plan_activations(model.config, targets, "autograd", 9, bits=32)
    config = LoraConfig(r=3, lora_dropout=0.1, target_modules=list(targets))
    assert saved_bytes(get_peft_model(model, config), 9) == plan.bytes


def test_autograd_of_ia3():
    model = network()
    targets = {"k_proj": IA3(), "v_proj": IA3(), "down_proj": IA3("input")}
    plan = plan_activations(model.config, targets, "autograd", 9, bits=32)
    config = IA3Config(target_modules=list(targets), feedforward_modules=["down_proj"])
    assert saved_bytes(get_peft_model(model, config), 9) == plan.bytes


@pytest.mark.parametrize("activation", ["tanh", "relu", "gelu", "silu", "identity"])
@pytest.mark.parametrize("place", ["series_output", "parallel"])
def test_autograd_of_bottleneck(activation, place):
    model = network()
    plan = plan_activations(
        model.config,
        {
            "up_proj": Bottleneck(7, activation, place),
            "down_proj": Bottleneck(7, activation, place),
        },
        "autograd",
        9,
        bits=32,
    )
    adapted = build(
        "bottleneck",
        model,
        target_modules=["up_proj", "down_proj"],
        bottleneck_size=7,
        activation=activation,
        placement=place,
    )
    assert saved_bytes(adapted, 9) == plan.bytes


@pytest.mark.parametrize("layers", [[0], [1], [2], [0, 2]])
def test_autograd_of_some_layers(layers):
    model = network()
    plan = plan_activations(
        model.config, {"up_proj": Lora(4)}, "autograd", 9, bits=32, layers=layers
    )
    config = LoraConfig(r=4, target_modules=["up_proj"], layers_to_transform=layers)
    assert saved_bytes(get_peft_model(model, config), 9) == plan.bytes


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_autograd_in_half_precision(attention):
    model = network(attention, dtype=torch.bfloat16)
    targets = {"q_proj": Lora(4), "down_proj": Lora(4)}
    plan = plan_activations(model.config, targets, "autograd", 9, flash=attention == "sdpa")
    config = LoraConfig(r=4, target_modules=list(targets))
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    assert saved_bytes(adapted, 9) == plan.bytes


# A plan is sufficient


@settings(max_examples=150, deadline=None)
@given(
    cases(),
    st.sampled_from(["pruned", "pruned+remat"]),
    st.booleans(),
    st.booleans(),
    st.integers(1, 9),
    st.integers(0, 10**6),
)
def test_gradients_from_kept_tensors_alone(case, mode, flash, input_gradient, tokens, seed):
    shape, targets = case
    graph = layer_graph(shape, targets, bits=32, flash=flash)
    plan = plan_layer(graph, mode, input_gradient=input_gradient)
    weights = random_weights(graph, seed)  # float64: some gradients are zero but for rounding
    executor = LayerExecutor(graph, shape, weights, tokens)
    names = tuple(sorted(graph.parameters))
    wanted = [weights[name] for name in names]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, shape.hidden, generator=generator, dtype=torch.float64)
    dy = torch.randn(tokens, shape.hidden, generator=generator, dtype=torch.float64)
    x.requires_grad_(input_gradient)
    sources = [x, *wanted] if input_gradient else wanted

    y = executor.forward(x)[graph.output]
    expected = torch.autograd.grad(y, sources, dy)
    planned = PlannedLayer.apply(executor, plan, input_gradient, names, x, *wanted)
    actual = torch.autograd.grad(planned, sources, dy)

    torch.testing.assert_close(planned, y)
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("mode", ["pruned", "pruned+remat"])
@pytest.mark.parametrize("targets", [("down_proj",), ("q_proj", "v_proj"), EVERY_LINEAR])
def test_planned_layer_in_the_place_of_a_hugging_face_layer(targets, mode):
    tokens = 13
    model = network()
    shape = LayerShape.of(model.config)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=list(targets), init_lora_weights=False)
    decoder = get_peft_model(model, config).get_base_model().model
    layer = decoder.layers[1]
    x = torch.randn(1, tokens, 48, requires_grad=True)
    dy = torch.randn(1, tokens, 48)
    places = decoder.rotary_emb(x, torch.arange(tokens)[None])
    y = layer(x, attention_mask=None, position_embeddings=places)
    parameters = {_short(n): p for n, p in layer.named_parameters()}
    trained = {n: p for n, p in parameters.items() if p.requires_grad}
    expected = torch.autograd.grad(y, [x, *trained.values()], dy)

    graph = layer_graph(shape, dict.fromkeys(targets, Lora(4)), bits=32)
    assert graph.parameters == trained.keys()
    plan = plan_layer(graph, mode, input_gradient=True)
    executor = LayerExecutor(graph, shape, parameters, tokens)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        planned = PlannedLayer.apply(executor, plan, True, tuple(trained), x[0], *trained.values())
    actual = torch.autograd.grad(planned, [x, *trained.values()], dy[0])

    torch.testing.assert_close(planned, y[0], rtol=1e-4, atol=1e-5)
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    assert sum(t.nbytes for t in kept) == sum(graph.values[n].bytes(tokens) for n in plan.kept)


def _short(name: str) -> str:
    """``self_attn.q_proj.lora_A.default.weight`` -> the graph's ``q_proj.lora_A.weight``"""
    for part in ("self_attn.", "mlp.", "default.", "base_layer."):
        name = name.replace(part, "")
    return name


# ... and minimal


def sufficient(graph: LayerGraph, kept: set[str], input_gradient: bool) -> bool:
    """Whether every needed gradient can be computed from ``kept`` and cheap ops."""
    have = computable(graph, kept)
    needed = needed_gradients(graph, input_gradient)
    return all(
        have.issuperset(gradient.reads)
        or (gradient.instead is not None and have.issuperset(gradient.instead))
        for op in graph.ops
        for gradient in op.gradients
        if gradient.of in needed
    )


@settings(max_examples=200, deadline=None)
@given(cases(), st.booleans(), st.booleans())
def test_no_kept_tensor_can_be_spared(case, flash, input_gradient):
    graph = layer_graph(*case, flash=flash)
    plan = plan_layer(graph, "pruned+remat", input_gradient=input_gradient)
    assert sufficient(graph, set(plan.kept), input_gradient)
    for name in plan.kept:
        assert not sufficient(graph, set(plan.kept) - {name}, input_gradient), name


@settings(max_examples=200, deadline=None)
@given(cases(), st.booleans(), st.booleans())
def test_pruning_alone_keeps_what_is_read_and_nothing_else(case, flash, input_gradient):
    graph = layer_graph(*case, flash=flash)
    plan = plan_layer(graph, "pruned", input_gradient=input_gradient)
    assert set(plan.kept) == set(reads(graph, input_gradient))
    assert not plan.rematerialised
    assert plan.kept.keys() | plan.dropped.keys() == graph.values.keys()


@settings(max_examples=20, deadline=None)
@given(st.data(), shapes, st.booleans())
def test_no_cheaper_set_of_read_tensors_suffices(data, shape, input_gradient):
    """Brute force. A tensor that nothing reads could still be the cheaper start of a recipe."""
    names = st.sampled_from(list(shape.modules))
    targets = data.draw(st.dictionaries(names, bypasses, min_size=1, max_size=2))
    graph = layer_graph(shape, targets)
    plan = plan_layer(graph, "pruned+remat", input_gradient=input_gradient)
    size = {name: value.bytes(64) for name, value in graph.values.items()}
    planned = sum(size[name] for name in plan.kept)

    readers = set(reads(graph, input_gradient))
    made = {recipe.value for recipe in graph.recipes}
    fixed = readers - made  # nothing gives these back
    free = sorted(readers & made)
    base = sum(size[name] for name in fixed)
    for count in range(len(free) + 1):
        for chosen in itertools.combinations(free, count):
            if base + sum(size[name] for name in chosen) < planned:
                assert not sufficient(graph, fixed | set(chosen), input_gradient), chosen


# Sizes


@settings(max_examples=100, deadline=None)
@given(
    cases(),
    st.integers(1, 200),
    st.sampled_from([16, 32]),
    st.booleans(),
    st.sets(st.integers(0, 2), min_size=1),
)
def test_each_mode_keeps_less(case, tokens, bits, flash, layers):
    shape, targets = case
    planned = {
        mode: plan_activations(shape, targets, mode, tokens, bits=bits, flash=flash, layers=layers)
        for mode in ("conventional", "autograd", "pruned", "pruned+remat")
    }
    for kind in ("layer_bytes", "head_bytes", "bytes"):
        of = {mode: getattr(plan, kind) for mode, plan in planned.items()}
        assert of["pruned+remat"] <= of["pruned"] <= of["autograd"]
        assert of["pruned"] <= of["conventional"]


@given(cases(), st.sampled_from(["autograd", "pruned", "pruned+remat", "layer_input"]))
@settings(max_examples=100, deadline=None)
def test_linear_in_tokens(case, mode):
    shape, targets = case
    # Multiples of 8: a mask of single bits fills whole bytes.
    one, two, three = (plan_activations(shape, targets, mode, n).bytes for n in (64, 128, 192))
    assert two - one == three - two > 0


def test_the_window_bounds_the_logits():
    targets = {"down_proj": Lora(2)}
    whole = plan_activations(LLAMA, targets, "pruned+remat", 64, bits=32)
    windowed = plan_activations(LLAMA, targets, "pruned+remat", 64, window=8, bits=32)
    assert whole.layer_bytes == windowed.layer_bytes
    assert whole.head_bytes - windowed.head_bytes == (64 - 8) * LLAMA.vocabulary * 4
    assert windowed.workspace_bytes == whole.workspace_bytes // 8
    assert plan_activations(LLAMA, targets, "pruned", 8, window=99).window == 8


def test_layer_input_is_input_keys_and_values():
    plan = plan_activations(LLAMA, {"up_proj": Lora(2)}, "layer_input", 10, bits=32, layers=[1])
    per_token = LLAMA.hidden + 2 * LLAMA.kv_heads * LLAMA.head_dim
    assert plan.layer_bytes == 2 * 10 * per_token * 4  # layers 1 and 2; layer 0 is idle
    assert {e.value.name for e in plan.kept} == {"x", "key", "v_proj"}


def test_frozen_llama_layer_drops_what_the_paper_says():
    graph = layer_graph(LLAMA, {"down_proj": Lora(2)})
    plan = plan_layer(graph, "pruned+remat", input_gradient=True)
    assert set(plan.kept) == {
        *("x", "query", "key", "v_proj", "mixed", "log_sum_exp"),
        *("middle", "gate_proj", "up_proj", "down_proj.lora_A"),
    }
    assert plan.rematerialised["product"] == "product of act, up_proj"
    assert plan.rematerialised["act"] == "act of gate_proj"


def test_relu_keeps_one_bit_unless_its_output_is_kept_anyway():
    opt = SHAPES["opt"]
    frozen = plan_layer(layer_graph(opt, {"up_proj": Lora(2)}), "pruned", input_gradient=True)
    assert "act.mask" in frozen.kept and "act" not in frozen.kept
    adapted = plan_layer(layer_graph(opt, {"down_proj": Lora(2)}), "pruned", input_gradient=True)
    assert "act" in adapted.kept and "act.mask" not in adapted.kept
    assert layer_graph(opt, {}).values["act.mask"].bytes(3) == 3 * 40 // 8


def test_lowest_layer_keeps_nothing_below_its_adapter():
    graph = layer_graph(LLAMA, {"down_proj": Lora(2)})
    plan = plan_layer(graph, "pruned+remat", input_gradient=False)
    assert set(plan.kept) == {"product", "down_proj.lora_A"}
    assert needed_gradients(graph, input_gradient=False) == {
        *("down_proj.lora_A.weight", "down_proj.lora_B.weight", "down_proj.lora_A"),
        *("down_proj.lora_B", "down_proj.sum", "output"),
    }


def test_redundant_is_order_free():
    graph = layer_graph(LLAMA, dict.fromkeys(EVERY_LINEAR, Lora(2)))
    wanted = list(reads(graph, True))
    assert redundant(graph, wanted) == redundant(graph, wanted[::-1])


def test_describe_names_every_tensor_with_its_reason():
    plan = plan_activations(LLAMA, {"down_proj": Lora(2)}, "pruned+remat", 16, bits=32, window=4)
    lines = [line.split(maxsplit=1) for line in plan.describe().splitlines()]
    assert {name for name, _ in lines} >= layer_graph(LLAMA, {"down_proj": Lora(2)}).values.keys()
    gate = [" ".join(rest.split()) for name, rest in lines if name == "gate_proj"]
    assert gate == [
        "[T, 40] 2,560 1-2 kept: read by the gradient of gate_proj",
        "[T, 40] 2,560 0 dropped: no needed gradient reads it",
    ]
    assert f"{plan.bytes:,} bytes = layers" in plan.describe()


# The paper's ablation


def test_token_level_of_a_small_model_is_a_fifth_of_pytorch_or_less():
    """The claim's memory part: SmolLM2-135M, LoRA r = 16 on down_proj, 256 tokens in float32."""
    shape = LayerShape(576, 1536, heads=9, kv_heads=3, head_dim=64, layers=30, vocabulary=49152)
    targets = {"down_proj": Lora(16)}
    pytorch = plan_activations(shape, targets, "autograd", 256, bits=32)
    ours = plan_activations(shape, targets, "layer_input", 256, bits=32, window=32)
    assert pytorch.bytes >= 5 * (ours.bytes + ours.workspace_bytes)


def test_ablation_has_the_order_of_the_paper():
    sizes = ablation(LLAMA_8B, 1024, 128)
    for method, row in sizes.items():
        assert row == sorted(row, reverse=True), method
        of = dict(zip((step.name for step in STEPS), row, strict=True))
        assert of["conventional, no flash"] > 2 * of["pruned"]
        assert of["conventional"] > 8 * of["layer input"]
    assert sizes["LoRA"][4] < 0.8 * sizes["LoRA"][3]


def test_document_shows_what_the_planner_computes():
    text = DOCUMENT.read_text()
    for table in (
        ablation_markdown(LLAMA_70B, 1024, 128, published=True),
        ablation_markdown(LLAMA_8B, 8192, 512),
    ):
        assert table in text, f"regenerate the table with ablation_markdown:\n{table}"


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": {}}, "nothing is trained"),
        ({"layers": []}, "nothing is trained"),
        ({"layers": [0, 3]}, "there is no layer 3"),
        ({"layers": [-1]}, "there is no layer -1"),
        ({"tokens": 0}, "at least 1"),
        ({"window": 0}, "at least 1"),
        ({"mode": "best"}, "mode is one of"),
    ],
)
def test_impossible_plans_are_refused(change, message):
    asked: dict[str, Any] = {"targets": {"q_proj": Lora(2)}, "mode": "pruned", "tokens": 4} | change
    with pytest.raises(ConfigurationError, match=message):
        plan_activations(LLAMA, **asked)


def test_unknown_module_is_refused_by_name():
    with pytest.raises(UnknownName, match="did you mean 'q_proj'"):
        plan_activations(LLAMA, {"q_prj": Lora(2)}, "pruned", 4)
    with pytest.raises(UnknownName, match="gate_proj"):
        plan_activations(SHAPES["opt"], {"gate_proj": Lora(2)}, "pruned", 4)


def test_other_models_are_refused():
    with pytest.raises(ConfigurationError, match="hidden_act='mish'"):
        LayerShape.of(LlamaConfig(hidden_act="mish"))
    with pytest.raises(ConfigurationError, match=r"model_type='gpt2'; known: llama"):
        LayerShape.of(GPT2Config())
