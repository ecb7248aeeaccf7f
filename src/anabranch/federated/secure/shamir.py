"""Secrets cut into shares, of which any ``threshold`` give the secret back and fewer tell nothing.

Shamir, "How to Share a Secret", Communications of the ACM 1979: the shares are values of a random
polynomial of degree ``threshold - 1`` over a prime field, the secret its value at 0.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping

PRIME = 2**521 - 1
"""A Mersenne prime above every 32-byte secret."""
SHARE_BYTES = 66
SECRET_BYTES = 32


def split(secret: bytes, threshold: int, shares: int) -> list[bytes]:
    """``shares`` shares of :data:`SHARE_BYTES` bytes, for the places 1, 2, ... in this order."""
    if not (len(secret) == SECRET_BYTES and 1 <= threshold <= shares):
        raise ValueError(f"{len(secret)} bytes, {threshold} of {shares} shares")
    coefficients = [int.from_bytes(secret, "big")]
    coefficients += [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
    return [
        _value(coefficients, place).to_bytes(SHARE_BYTES, "big") for place in range(1, shares + 1)
    ]


def recover(shares: Mapping[int, bytes]) -> bytes | None:
    """The secret of at least ``threshold`` shares by place; None if they are of no such secret.

    Lagrange's interpolation at 0. Too few or changed shares give None, or another secret.
    """
    total = 0
    for place, share in shares.items():
        above, below = 1, 1
        for other in shares:
            if other != place:
                above = above * other % PRIME
                below = below * (other - place) % PRIME
        value = int.from_bytes(share, "big")
        total = (total + value * above * pow(below, -1, PRIME)) % PRIME
    return None if total.bit_length() > 8 * SECRET_BYTES else total.to_bytes(SECRET_BYTES, "big")


def _value(coefficients: list[int], place: int) -> int:
    """Horner's rule."""
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * place + coefficient) % PRIME
    return value
