"""Which modules of a network an adapter goes on.

A target is a name (``q_proj``, or more of the path: ``layers.0.mlp.up_proj``) or a preset:

    preset              modules                                  in a Llama
    all-linear          every linear one but the output head     q,k,v,o,gate,up,down_proj
    attention           those of attention                       q,k,v,o_proj
    mlp                 those of the feed-forward block          gate,up,down_proj
    attention-output    attention's last one                     o_proj
    mlp-input           the feed-forward block's first           gate,up_proj
    mlp-output          its last                                 down_proj
    norm                normalisations                           input_layernorm, norm, ...
    embedding           token embeddings                         embed_tokens
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from anabranch.adapters.errors import AdapterError
from anabranch.errors import did_you_mean

PRESETS = (
    "all-linear",
    "attention",
    "mlp",
    "attention-output",
    "mlp-input",
    "mlp-output",
    "norm",
    "embedding",
)
_ATTENTION = re.compile(r"attn|attention|(^|\.)(q|k|v|o)_proj$|query_key_value$")
_ATTENTION_OUTPUT = {"o_proj", "out_proj", "c_proj", "dense", "wo", "output_proj"}
_MLP_INPUT = {
    *("up_proj", "gate_proj", "gate_up_proj", "fc1", "dense_h_to_4h", "fc_in", "c_fc"),
    *("w1", "w3", "wi", "wi_0", "wi_1", "lin1"),
}
_MLP_OUTPUT = {"down_proj", "fc2", "dense_4h_to_h", "fc_out", "c_proj", "w2", "wo", "lin2"}


def resolve_targets(model: nn.Module, wanted: str | Sequence[str]) -> list[str]:
    """Names for ``target_modules``: presets replaced by the shortest names that say the same.

    Raises :class:`AdapterError` with the five nearest module names if one matches nothing.
    """
    wanted = [wanted] if isinstance(wanted, str) else list(wanted)
    if not wanted:
        raise AdapterError("target_modules is empty; name modules or one of " + ", ".join(PRESETS))
    modules = plain_modules(model)
    found: set[str] = set()
    for target in wanted:
        if target in PRESETS:
            chosen = {name for name, module in modules.items() if _in_preset(name, module, target)}
            if target == "all-linear":
                chosen.discard(_head(model, modules))
            names = _shortest(chosen, modules)
        else:
            names = {target} if matching(model, [target]) else set()
        if not names:
            raise AdapterError(_unmatched(target, modules))
        found |= names
    return sorted(found)


def matching(model: nn.Module, targets: Iterable[str]) -> list[str]:
    """Full names of the modules that these resolved targets adapt, in the model's order."""
    names = tuple(targets)
    return [
        module
        for module in plain_modules(model)
        if module in names or module.endswith(tuple("." + name for name in names))
    ]


def is_linear(module: nn.Module) -> bool:
    """A linear map of the last dimension, quantised ones included."""
    return isinstance(module, Conv1D) or (
        hasattr(module, "in_features") and hasattr(module, "out_features")
    )


def is_norm(module: nn.Module) -> bool:
    """LayerNorm, RMSNorm and their kin: a vector as weight, and named so."""
    weight = getattr(module, "weight", None)
    named = "norm" in type(module).__name__.lower() or isinstance(module, nn.LayerNorm)
    return named and weight is not None and weight.dim() == 1


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by name as in the base, whatever PEFT has wrapped around them."""
    plain: dict[str, nn.Module] = {}
    wrapped: list[str] = []
    adapted: Any = model
    network: nn.Module = adapted.get_base_model() if hasattr(model, "get_base_model") else model
    for name, module in network.named_modules():
        if any(name.startswith(outer + ".") for outer in wrapped):
            continue
        if hasattr(module, "base_layer"):
            wrapped.append(name)
            module = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        if name:
            plain[name] = module
    return plain


def _in_preset(name: str, module: nn.Module, preset: str) -> bool:
    if preset == "norm":
        return is_norm(module)
    if preset == "embedding":
        return isinstance(module, nn.Embedding) and "position" not in name and "wpe" not in name
    if not is_linear(module):
        return False
    leaf = name.rpartition(".")[2]
    attention = _ATTENTION.search(name) is not None
    inside = re.search(r"\.\d+\.", name) is not None  # in one of the numbered layers
    return {
        "all-linear": True,
        "attention": attention,
        "mlp": inside and not attention and leaf in _MLP_INPUT | _MLP_OUTPUT,
        "attention-output": attention and leaf in _ATTENTION_OUTPUT,
        "mlp-input": inside and not attention and leaf in _MLP_INPUT,
        "mlp-output": inside and not attention and leaf in _MLP_OUTPUT,
    }[preset]


def _head(model: nn.Module, modules: dict[str, nn.Module]) -> str:
    network: Any = model
    head = network.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return next((name for name, module in modules.items() if module is head), "")


def _shortest(chosen: set[str], modules: dict[str, nn.Module]) -> set[str]:
    """Suffixes that match exactly the chosen modules: ``q_proj``, or ``attn.c_proj`` in a GPT-2."""
    others = modules.keys() - chosen
    suffixes = set()
    for name in chosen:
        parts = name.split(".")
        tails = (".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1))
        suffixes.add(
            next(
                tail
                for tail in tails
                if not any(other == tail or other.endswith("." + tail) for other in others)
            )
        )
    return suffixes


def _unmatched(target: str, modules: dict[str, nn.Module]) -> str:
    if target in PRESETS:
        return f"target_modules: this model has no module for {target!r}; name modules instead"
    leaves = sorted({name.rpartition(".")[2] for name in modules} | set(modules))
    nearest = difflib.get_close_matches(target, leaves, n=5, cutoff=0.0)
    return (
        f"target_modules: no module is named {target!r}{did_you_mean(target, PRESETS)}; "
        f"nearest: {', '.join(nearest)}"
    )
