"""What two oriented points have that no rigid motion changes (section 3 of the PONITA paper)."""

from __future__ import annotations

import torch
from torch import Tensor


def invariants(
    relative: Tensor,
    receiver: Tensor | None = None,
    sender: Tensor | None = None,
    extra: bool = False,
) -> Tensor:
    """Invariants [..., k] of pairs; arguments broadcast against each other.

    ``relative`` is the sender's position minus the receiver's, ``receiver`` and ``sender`` are
    unit directions, all [..., D].

    ==================  ==============================================================
    only ``relative``   its length
    and ``receiver``    a1 = along the direction; a2 = distance from that line, signed in 2D
    and ``sender``      also a3 = product of the directions; a4 = along the sender's, if ``extra``
    ==================  ==============================================================

    In 3D reflections change none of them; in 2D they change the sign of a2.
    """
    if receiver is None:
        return length(relative).unsqueeze(-1)
    along = (relative * receiver).sum(-1)
    if relative.shape[-1] == 2:
        off = relative[..., 1] * receiver[..., 0] - relative[..., 0] * receiver[..., 1]
    else:
        off = length(relative - along.unsqueeze(-1) * receiver)
    found = [along, off]
    if sender is not None:
        found.append((receiver * sender).sum(-1))
        if extra:
            found.append((relative * sender).sum(-1))
    return torch.stack(torch.broadcast_tensors(*found), dim=-1)


def length(vectors: Tensor) -> Tensor:
    """Euclidean length [...] of vectors [..., D].

    The gradient at zero is zero, and so are higher ones: self-loops take no part in forces.
    """
    squares = (vectors * vectors).sum(-1)
    positive = squares > 0
    return torch.where(positive, squares, 1.0).sqrt() * positive


def polynomial(values: Tensor, degree: int) -> Tensor:
    """The values [..., k] and all products of up to ``degree`` of them: [..., k + k^2 + ...]."""
    terms = [values]
    for _ in range(degree - 1):
        terms.append((terms[-1].unsqueeze(-1) * values.unsqueeze(-2)).flatten(-2))
    return torch.cat(terms, dim=-1)


def smooth_cutoff(distance: Tensor, radius: float, order: int = 6) -> Tensor:
    """1 at distance 0, 0 from ``radius`` on, with two continuous derivatives there.

    The polynomial of DimeNet (Gasteiger et al., ICLR 2020, section 5).
    """
    z, q = distance / radius, order
    inside = (
        1
        - (q + 1) * (q + 2) / 2 * z**q
        + q * (q + 2) * z ** (q + 1)
        - q * (q + 1) / 2 * z ** (q + 2)
    )
    return torch.where(z < 1, inside, 0.0)
