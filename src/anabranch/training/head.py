"""Negative log-likelihood of target tokens from hidden states, without ``[rows, vocabulary]``.

At 49,152 tokens in the vocabulary, the float32 logits of 4,096 rows take 0.8 GB, and autograd keeps
as much again. Here a chunk of rows at a time passes the head. If the head is frozen, which is the
usual case with adapters, the gradient of a row's loss with respect to its hidden state is computed
in the same pass, because it only has to be scaled later: nothing is computed twice. A trained head
recomputes its chunks in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 2**24
"""Logits computed at a time: 64 MiB in float32."""


@runtime_checkable
class FrozenProduct(Protocol):
    """A matrix that takes no gradient, however it is stored."""

    def product(self, x: Tensor) -> Tensor:
        """``x W^T``, ``[rows, inputs] -> [rows, outputs]``."""

    def transposed(self, gradient: Tensor) -> Tensor:
        """``gradient W``, ``[rows, outputs] -> [rows, inputs]``."""


@dataclass(frozen=True)
class Head:
    """Output projection of a language model and what its architecture does to the logits."""

    project: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, project: nn.Module, config: Any) -> Head:
        """Read scale and cap from a configuration (Granite, Cohere and Gemma name them)."""
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        scale = (getattr(text, "logit_scale", None) or 1.0) / (
            getattr(text, "logits_scaling", None) or 1.0
        )
        return cls(project, scale, getattr(text, "final_logit_softcapping", None))

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits ``[rows, vocabulary]`` of hidden states ``[rows, hidden]``."""
        logits = self.project(hidden).float() * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    @property
    def frozen(self) -> FrozenProduct | None:
        """The product, if the head is nothing but a frozen matrix."""
        project = self.project
        if (
            self.softcap is not None
            or self.scale != 1.0
            or getattr(project, "bias", None) is not None
        ):
            return None
        if isinstance(project, FrozenProduct):
            return project
        if type(project) is not nn.Linear or project.weight.requires_grad:
            return None
        return _FrozenMatrix(project.weight)


def token_nll(head: Head, hidden: Tensor, targets: Tensor, chunk: int | None = None) -> Tensor:
    """Negative log-likelihood ``[rows]``, float32, of ``targets`` ``[rows]`` given ``hidden``.

    ``chunk`` is how many rows pass the head at a time; the result does not depend on it.
    """
    frozen = head.frozen
    if chunk is None:
        vocabulary = getattr(head.project, "out_features", None) or 2**16
        chunk = max(1, CHUNK_ELEMENTS // vocabulary)
    if frozen is not None:
        nll: Tensor = _FrozenHead.apply(hidden, frozen, targets, chunk)
        return nll
    return _by_chunk(head.logits, hidden, targets, chunk)


def chunked_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """The same from logits ``[rows, vocabulary]`` that exist already, in any precision."""
    chunk = max(1, CHUNK_ELEMENTS // logits.shape[-1])
    return _by_chunk(Tensor.float, logits, targets, chunk)


def _by_chunk(
    to_logits: Callable[[Tensor], Tensor], rows: Tensor, targets: Tensor, chunk: int
) -> Tensor:
    def nll(part: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(to_logits(part), wanted, reduction="none")

    parts = []
    for part, wanted in zip(rows.split(chunk), targets.split(chunk), strict=True):
        if torch.is_grad_enabled():
            parts.append(checkpoint(nll, part, wanted, use_reentrant=False))
        else:
            parts.append(nll(part, wanted))
    return torch.cat(parts)


class _FrozenMatrix:
    """A dense weight ``[outputs, inputs]``, multiplied in its own type or in autocast's."""

    def __init__(self, weight: Tensor) -> None:
        device = weight.device.type
        autocast = torch.is_autocast_enabled(device)
        self._weight = weight.to(torch.get_autocast_dtype(device)) if autocast else weight

    def product(self, x: Tensor) -> Tensor:
        return x.to(self._weight.dtype) @ self._weight.T

    def transposed(self, gradient: Tensor) -> Tensor:
        return gradient.to(self._weight.dtype) @ self._weight


class _FrozenHead(torch.autograd.Function):
    """Row losses of a frozen matrix; ``d nll_r / d hidden_r = (softmax(logits_r) - onehot) W``."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, frozen: FrozenProduct, targets: Tensor, chunk: int
    ) -> Tensor:
        nll = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        wants_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wants_gradient else None
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            wanted = targets[rows, None]
            logits = frozen.product(hidden[rows]).float()
            normaliser = logits.logsumexp(dim=-1, keepdim=True)
            nll[rows] = (normaliser - logits.gather(1, wanted)).squeeze(1)
            if gradient is not None:
                probabilities = logits.sub_(normaliser).exp_()
                probabilities.scatter_add_(1, wanted, -torch.ones_like(nll[rows, None]))
                gradient[rows] = frozen.transposed(probabilities).to(gradient.dtype)
        ctx.save_for_backward(*([gradient] if gradient is not None else []))
        return nll

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outputs[0][:, None].to(gradient.dtype), None, None, None
