"""How a language model computes the scores of a micro-batch, chosen by trying it.

``body`` runs the network below the output head and applies the head to the trained rows; ``whole``
calls the model and takes rows of its logits, for adapters that live in the model's own forward
(prompt and prefix tuning) and for heads that do more than :class:`Head` knows. Which one is right,
and that packed sequences do not see each other, is not assumed from a list of architectures: a few
tokens are computed every way, once, and compared.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from anabranch.training.errors import TrainingError
from anabranch.training.example import Example
from anabranch.training.head import Head, chunked_nll, token_nll
from anabranch.training.packing import FORWARD_COST, Layout, Packing, Segment
from anabranch.training.sequences import SequenceBatch, attention_inputs, build

logger = logging.getLogger(__name__)

Route = Literal["body", "whole"]

PROBE_TOKENS = 6
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.03}
"""Largest difference of a token's loss between two exact ways, for weights of order one. A leak
between sequences or a forgotten scale changes the losses of random tokens by far more."""


def nll(model: nn.Module, batch: SequenceBatch, route: Route) -> Tensor:
    """Negative log-likelihood ``[trained]`` of the trained tokens, float32, with gradient."""
    base = base_model(model)
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids,
        "use_cache": False,
        **attention_inputs(batch, base.config, base.dtype),
    }
    if route == "body":
        hidden = base.base_model(**inputs).last_hidden_state  # [rows, columns, hidden]
        rows = hidden.flatten(0, 1).index_select(0, batch.predictors)  # [trained, hidden]
        return token_nll(Head.of(base.get_output_embeddings(), base.config), rows, batch.targets)
    # Prompt tuning puts its tokens first, so that ours are the last columns.
    logits = model(**inputs).logits[:, -batch.input_ids.shape[1] :]
    return chunked_nll(logits.flatten(0, 1).index_select(0, batch.predictors), batch.targets)


def base_model(model: nn.Module) -> Any:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model


def choose_route(model: nn.Module, packing: Packing) -> Route:
    """The cheapest exact route for this model.

    Raises :class:`TrainingError` if the model is no causal language model, or if ``packing`` would
    let sequences see each other.
    """
    base = base_model(model)
    if not callable(getattr(base, "get_output_embeddings", None)) or not hasattr(base, "config"):
        raise TrainingError(
            f"{type(base).__name__} is no transformers language model: it needs "
            f"get_output_embeddings() and a config; train other networks with their own Objective"
        )
    attention = base.config.get_text_config()._attn_implementation
    if packing != "none" and attention not in ("sdpa", "eager"):
        raise TrainingError(
            f"attention {attention!r} takes no block mask, so that packed sequences would see each "
            f"other; load the model with attn_implementation='sdpa', or set packing: none"
        )
    with evaluating(model), torch.no_grad():
        alone, packed = _probe_batches(model)
        expected = nll(model, alone, "whole")
        limit = TOLERANCE[base.dtype] * max(1.0, float(expected.abs().max()))
        route: Route = "body"
        difference = _difference(model, alone, "body", expected)
        if not difference <= limit:
            route = "whole"
            logger.info(
                "%s: the head alone gives other losses (by %.2g), so whole logits are computed",
                type(base).__name__,
                difference,
            )
        if packing == "none":
            return route
        leak = _difference(model, packed, route, expected)
        if not leak <= limit:
            raise TrainingError(
                f"{type(base).__name__}: packed sequences see each other (losses change by "
                f"{leak:.2g}), because its layers or its adapter ignore a block mask; set "
                f"packing: none"
            )
    return route


def start_cost(model: nn.Module) -> float:
    """Cost in tokens of starting a forward pass on the model's device."""
    device = next(model.parameters()).device.type
    return FORWARD_COST["cpu" if device == "cpu" else "cuda"]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) inside, the previous mode after."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def base_only(model: nn.Module) -> Iterator[None]:
    """The adapter switched off inside. PEFT resets what takes gradients; it is put back after."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with cast(Any, model).disable_adapter():
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _difference(model: nn.Module, batch: SequenceBatch, route: Route, expected: Tensor) -> float:
    """Largest difference from the expected losses; infinite if the model cannot run it so."""
    try:
        return float((nll(model, batch, route) - expected).abs().max())
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        logger.debug("route %s failed: %s", route, error)
        return float("inf")


def _probe_batches(model: nn.Module) -> tuple[SequenceBatch, SequenceBatch]:
    """Two sequences in rows of their own, and the same two in one row."""
    vocabulary = base_model(model).config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    items = []
    for length in (PROBE_TOKENS, PROBE_TOKENS - 2):
        tokens = torch.randint(vocabulary, (length,), generator=generator).tolist()
        items.append((Example(tokens, [False] + [True] * (length - 1)),))
    long, short = (len(item[0]) for item in items)
    apart = Layout((Segment(0, 0, 0, 0, long), Segment(1, 0, 1, 0, short)))
    together = Layout((Segment(0, 0, 0, 0, long), Segment(1, 0, 0, long, short)))
    device = next(model.parameters()).device
    return build(items, apart, 0, device), build(items, together, 0, device)
