"""Key agreement, masks and sealed letters between two sites; all primitives are of a library."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from anabranch.errors import MissingExtra
from anabranch.federated.errors import PayloadError
from anabranch.federated.secure.fixed_point import Vector

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

KEY_BYTES = 32
_NONCE_BYTES = 12


def require_cryptography() -> None:
    """Raises :class:`MissingExtra` before anything begins."""
    try:
        import cryptography  # noqa: F401
    except ImportError:
        raise MissingExtra("cryptography", "federation") from None


def new_pair() -> tuple[bytes, bytes]:
    """A private and a public X25519 key. From the system's randomness: the coordinator knows the
    run's seed.
    """
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    key = X25519PrivateKey.generate()
    return key.private_bytes_raw(), key.public_key().public_bytes_raw()


def public_of(private: bytes) -> bytes:
    """The public key of a private one."""
    return _private(private).public_key().public_bytes_raw()


def agree(private: bytes, public: bytes, use: str) -> bytes:
    """The key that two sites share for one use: HKDF-SHA256 of their X25519 secret.

    Raises :class:`PayloadError` for a public key that is none.
    """
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    try:
        secret = _private(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise PayloadError(f"this is no public key: {error}") from None
    info = f"anabranch secure sum 1: {use}".encode()
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=info).derive(secret)


def stream(seed: bytes, size: int, dtype: np.dtype[Any]) -> Vector:
    """``size`` integers, random to whoever does not know the seed: AES-256 in counter mode."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    encryptor = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor()
    return np.frombuffer(encryptor.update(bytes(size * dtype.itemsize)), dtype=dtype)


def seal(key: bytes, content: bytes, about: bytes) -> bytes:
    """Encrypted and authenticated together with ``about`` (AES-256-GCM)."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    nonce = os.urandom(_NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, content, about)


def unseal(key: bytes, sealed: bytes, about: bytes) -> bytes:
    """The content; :class:`PayloadError` if it was changed or is not about that."""
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    try:
        return AESGCM(key).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], about)
    except (InvalidTag, ValueError):
        raise PayloadError("a sealed share cannot be opened: it was changed on the way") from None


def _private(key: bytes) -> X25519PrivateKey:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    return X25519PrivateKey.from_private_bytes(key)
