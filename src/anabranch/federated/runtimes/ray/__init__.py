"""Clients in actors of a Ray cluster: simulations larger than a machine.

Needs the extra ``ray``; importing this package says so if it is missing.
"""

from anabranch.errors import MissingExtra

try:
    import ray as _ray  # noqa: F401
except ImportError:
    raise MissingExtra("ray", "ray") from None

from anabranch.federated.runtimes.ray.runtime import Ray

__all__ = ["Ray"]
