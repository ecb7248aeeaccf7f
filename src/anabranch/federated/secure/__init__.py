"""Sums of updates that are opened without opening an update."""

from anabranch.federated.secure.client import SecureClient
from anabranch.federated.secure.fixed_point import FixedPoint, OutOfRange
from anabranch.federated.secure.protocol import BelowThreshold, SecureOptions, WrongShares
from anabranch.federated.secure.schedule import SecureSync
from anabranch.federated.secure.server import SecureServer
from anabranch.federated.secure.strategy import Secure, refuse_codec, secure_schedule

__all__ = [
    "BelowThreshold",
    "FixedPoint",
    "OutOfRange",
    "Secure",
    "SecureClient",
    "SecureOptions",
    "SecureServer",
    "SecureSync",
    "WrongShares",
    "refuse_codec",
    "secure_schedule",
]
