"""What SuperLink and SuperNodes prove who they are with, made on this machine."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from anabranch.federated.runtimes.network.certificate import write_private

DAYS = 3650
"""A federation should not end because a certificate does."""


def make_certificate(certificate: Path, key: Path, address: str) -> None:
    """Of an authority that vouches for itself, for this machine under one address."""
    made = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, "anabranch flower")])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address(address))]
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(made.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(made, hashes.SHA256())
    )
    write_private(key, _pem(made))
    write_private(certificate, signed.public_bytes(serialization.Encoding.PEM))


def make_key(folder: Path) -> None:
    """A SuperNode's key pair, ``node.pem`` and ``node.pub``, of a kind that Flower takes."""
    folder.mkdir(parents=True, exist_ok=True)
    made = ec.generate_private_key(ec.SECP384R1())
    public = made.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    (folder / "node.pub").write_bytes(public)
    write_private(folder / "node.pem", _pem(made, serialization.PrivateFormat.OpenSSH))


def _pem(
    key: ec.EllipticCurvePrivateKey,
    form: serialization.PrivateFormat = serialization.PrivateFormat.PKCS8,
) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        form,
        serialization.NoEncryption(),
    )
