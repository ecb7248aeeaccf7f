"""SCALLION and SCAFCOM: SCAFFOLD whose one increment is compressed."""

from __future__ import annotations

from typing import Any

from anabranch.errors import ConfigurationError
from anabranch.federated.client import ClientContext
from anabranch.federated.codecs import Codec, Quantise, TopK
from anabranch.federated.strategies.controlled import Controlled, fraction
from anabranch.federated.strategies.directions import Tensors


class Scallion(Controlled):
    """SCAFFOLD with unbiased compression of a damped increment (Huang et al. 2024, algorithm 2).

    Use it to send 2 to 8 bits a value where clients' data differ much. A client sends
    ``C(alpha * (mean gradient - own control))`` and adds exactly that, as the server decodes it, to
    its own control; no error feedback is needed, as increments vanish at the optimum. ``alpha`` 1
    without a codec is SCAFFOLD; the coarser the codec, the smaller ``alpha``.

    ``codec`` must be unbiased; the default is ``Quantise(bits)``. The federation's own codec leaves
    the increment as it is.
    """

    name = "scallion"

    def __init__(
        self,
        alpha: float = 0.1,
        bits: int = 4,
        server_lr: float = 1.0,
        codec: Codec | None = None,
    ) -> None:
        super().__init__(server_lr)
        self.alpha = fraction("alpha", alpha)
        self.codec = codec or Quantise(bits)
        if not self.codec.unbiased:
            raise ConfigurationError(
                f"scallion needs an unbiased codec, which {self.codec!r} is not; use scafcom"
            )

    def increment(self, ctx: ClientContext, found: Tensors, own: dict[str, Any]) -> Tensors:
        """Damped, so that the codec's noise is damped, too."""
        return {name: self.alpha * d for name, d in found.items()}


class Scafcom(Controlled):
    """SCAFFOLD with biased compression, such as Top-k (Huang et al. 2024, algorithm 3).

    Use it to send a few per cent of the values. A client keeps a running mean of its gradients,
    ``v = (1 - beta) v + beta * mean gradient``, and sends ``C(v - own control)``. ``beta`` 1
    without a codec is SCAFFOLD.

    ``codec`` may be any; the default is ``TopK(keep)``, and ``Chain([TopK(0.05), Quantise(8)])`` is
    smaller still. The federation's own codec leaves the increment as it is.
    """

    name = "scafcom"

    def __init__(
        self,
        beta: float = 0.2,
        keep: float = 0.05,
        server_lr: float = 1.0,
        codec: Codec | None = None,
    ) -> None:
        super().__init__(server_lr)
        self.memory = fraction("beta", beta)
        """Weight of the newest gradient; no part of the local steps, as ``beta`` elsewhere is."""
        self.codec = codec or TopK(keep)

    def increment(self, ctx: ClientContext, found: Tensors, own: dict[str, Any]) -> Tensors:
        """From the own control to the running mean of gradients."""
        control = own.get("control")
        gradient = {n: d + control[n] if control else d for n, d in found.items()}
        old = own.get("mean")
        mean = {
            n: self.memory * g + (1 - self.memory) * old[n] if old else self.memory * g
            for n, g in gradient.items()
        }
        own["mean"] = mean
        return {n: m - control[n] if control else m for n, m in mean.items()}
