"""What a site is given to join: one text that says where, whom to trust, and a secret for once."""

from __future__ import annotations

import base64
import json
from dataclasses import asdict, dataclass
from urllib.parse import urlsplit

from anabranch.addresses import is_loopback
from anabranch.federated.runtimes.network.errors import InvitationError

PREFIX = "anabranch-site-"


@dataclass(frozen=True)
class Invitation:
    """``address`` is ``https://host:port``, ``run`` the id of the federation.

    ``fingerprint`` is the SHA-256 of the coordinator's certificate, in hexadecimal digits; empty
    without TLS. ``secret`` admits one site, once.
    """

    address: str
    run: str
    secret: str
    fingerprint: str = ""

    def __str__(self) -> str:
        fields = json.dumps(asdict(self), separators=(",", ":")).encode()
        return PREFIX + base64.urlsafe_b64encode(fields).decode().rstrip("=")

    @classmethod
    def parse(cls, text: str) -> Invitation:
        """The invitation of a text. Raises :class:`InvitationError`."""
        text = "".join(text.split())  # mail programs break lines
        body = text.removeprefix(PREFIX)
        try:
            if body == text:
                raise ValueError(f"it does not begin with {PREFIX}")
            fields = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
            made = cls(**fields)
            if not all(isinstance(value, str) for value in fields.values()):
                raise ValueError("its parts are no texts")
            host_of(made.address)
        except (ValueError, TypeError) as error:
            raise InvitationError(
                f"this is no whole invitation ({error}); copy all of the line that begins with "
                f"{PREFIX}, or ask for a new one: anabranch federation invite"
            ) from None
        return made


def host_of(address: str) -> tuple[str, int]:
    """Host and port of an address; ValueError if it has none."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{address!r} is no http or https address")
    return parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)


def require_safe(address: str, insecure: bool) -> None:
    """Raises :class:`InvitationError` for an address without TLS, unless it is on this machine."""
    if address.startswith("https://") or insecure or is_loopback(host_of(address)[0]):
        return
    raise InvitationError(
        f"{address} is not encrypted: whoever is on the way could read and change the model; serve "
        f"without --insecure, or add --insecure here if the network itself is trusted"
    )
