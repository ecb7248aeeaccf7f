"""Mixed precision: weights and optimiser in float32, matrix products in what the device likes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from anabranch.models.dtype import BFLOAT16_INSTRUCTIONS
from anabranch.training.errors import TrainingError

Precision = Literal["auto", "fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve(precision: Precision, device: torch.device) -> torch.dtype:
    """The format of matrix products on this device."""
    if precision != "auto":
        return DTYPES[precision]
    if device.type == "cuda":
        # Ampere is the first generation that multiplies bfloat16.
        ampere = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if ampere else torch.float16
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        native = any(capabilities.get(name) for name in BFLOAT16_INSTRUCTIONS)
        return torch.bfloat16 if native else torch.float32
    return torch.float32


class MixedPrecision:
    """Autocast, and the loss scaling that float16 needs so that small gradients do not vanish."""

    def __init__(self, precision: Precision, device: torch.device) -> None:
        self.dtype = resolve(precision, device)
        self._device = device
        self._scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)

    def autocast(self) -> AbstractContextManager[Any]:
        """Context of the forward pass."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self._device.type, self.dtype)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss, scaled until :meth:`unscale`."""
        self._scaler.scale(loss).backward()

    def unscale(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the scale, so that they can be clipped and looked at."""
        if self._scaler.is_enabled():
            self._scaler.unscale_(optimizer)

    def finish(self) -> bool:
        """Adapt the scale. True if an overflow in this step may be the scale's fault."""
        if not self._scaler.is_enabled():
            return False
        scale = self._scaler.get_scale()
        self._scaler.update()
        return scale > 1.0

    def require_trainable(self, name: str, parameter: Tensor) -> None:
        """Refuse weights that cannot hold small updates."""
        if parameter.dtype == torch.float16:
            raise TrainingError(
                f"{name} is float16 and would lose most updates; load the model with "
                f"dtype='float32' (precision: fp16 still multiplies in float16)"
            )

    def state_dict(self) -> dict[str, Any]:
        """The loss scale."""
        return dict(self._scaler.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the loss scale."""
        if state:
            self._scaler.load_state_dict(dict(state))
