"""The coordinator's certificate: made once, signed by itself, and pinned by every invitation.

No authority has to vouch for it: a site trusts exactly the certificate whose SHA-256 its invitation
holds, under whatever name or address it reaches it.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import os
import ssl
from dataclasses import dataclass
from pathlib import Path

from anabranch.errors import MissingExtra
from anabranch.federated.runtimes.network.errors import NotAllowed
from anabranch.federated.runtimes.network.invitation import host_of

DAYS = 3650
"""A federation should not end because a certificate does."""


@dataclass(frozen=True)
class Certificate:
    """Files of a certificate and its key, and the SHA-256 of the former, in hexadecimal digits."""

    certificate: Path
    key: Path
    fingerprint: str


def ensure_certificate(folder: Path) -> Certificate:
    """The certificate in a folder, made if there is none. The key is readable by its owner only."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    if not certificate.exists():
        made_key, made = _make()
        folder.mkdir(parents=True, exist_ok=True)
        write_private(key, made_key)
        write_private(certificate, made)  # last: where it is, the key is, too
    der = ssl.PEM_cert_to_DER_cert(certificate.read_text())
    return Certificate(certificate, key, hashlib.sha256(der).hexdigest())


def pinned(address: str, fingerprint: str, timeout: float = 10.0) -> ssl.SSLContext:
    """A context that trusts one certificate only: the one at an address, if its digest is right.

    Raises :class:`NotAllowed` if another one is there, and OSError if nothing answers.
    """
    found = ssl.get_server_certificate(host_of(address), timeout=timeout)
    digest = hashlib.sha256(ssl.PEM_cert_to_DER_cert(found)).hexdigest()
    if not hmac.compare_digest(digest, fingerprint):
        raise NotAllowed(
            f"{address} has another certificate than the invitation says: somebody is in between, "
            f"or the coordinator's folder is a new one; ask for a new invitation"
        )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # The certificate itself is known, so that the name in it says nothing more.
    context.check_hostname = False
    context.load_verify_locations(cadata=found)
    return context


def write_private(path: Path, data: bytes) -> None:
    """Write a file that only its owner can read, whole or not at all."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def _make() -> tuple[bytes, bytes]:
    """A new key and its certificate, as PEM."""
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError:
        raise MissingExtra("cryptography", "federation") from None
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, "anabranch coordinator")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))  # clocks differ
        .not_valid_after(now + datetime.timedelta(days=DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return private, certificate.public_bytes(serialization.Encoding.PEM)
