"""What can go wrong with adapters."""

from __future__ import annotations

from anabranch.errors import AdapterError, AnabranchError

__all__ = ["AdapterError", "AdapterMismatch", "NotMergeable"]


class NotMergeable(AdapterError):
    """This adapter has no equivalent in the base's weights; the message says why."""


class AdapterMismatch(AnabranchError):
    """A stored adapter does not belong to this model."""

    exit_code = 2
    status = 400
