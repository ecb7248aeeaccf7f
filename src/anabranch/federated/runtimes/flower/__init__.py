"""Flower (flwr) as a runtime: the federation's loop in a ServerApp, its clients on SuperNodes."""

from anabranch.federated.runtimes.flower.missing import FlowerMissing

try:
    import flwr as _flwr  # noqa: F401
except ImportError:
    raise FlowerMissing from None

from anabranch.federated.runtimes.flower.apps import client_app
from anabranch.federated.runtimes.flower.deployment import Deployment
from anabranch.federated.runtimes.flower.resident import Place
from anabranch.federated.runtimes.flower.runtime import Flower
from anabranch.federated.runtimes.flower.strategy import (
    FlowerStrategy,
    answer,
    to_flower_strategy,
)

__all__ = [
    "Deployment",
    "Flower",
    "FlowerStrategy",
    "Place",
    "answer",
    "client_app",
    "to_flower_strategy",
]
