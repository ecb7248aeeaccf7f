"""Finds plug-ins: one registry for every kind.

A *kind* is a base class whose concrete subclasses carry a ``name`` of their own; one that inherits
its name is a variation and no plug-in. A subclass is found when it lives in the package of its base
class, or when an installed distribution names it under the entry-point group ``anabranch.<kind>``::

    [project.entry-points."anabranch.policies"]
    mine = "my_package.policies:MyPolicy"

Nothing is registered by hand and nothing is kept in a global table.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from importlib.metadata import entry_points
from typing import Any

from anabranch.errors import UnknownName

KINDS: dict[str, str] = {
    "adapters": "anabranch.adapters:Tuner",
    "aggregators": "anabranch.federated.aggregation:Rule",
    "benchmarks": "anabranch.evaluation.benchmarks:Benchmark",
    "balancers": "anabranch.training.losses:Balancer",
    "claims": "anabranch.claims:Claim",
    "codecs": "anabranch.federated.codecs:Codec",
    "constraints": "anabranch.serving.constraints:ConstraintBackend",
    "controllers": "anabranch.serving.speculation:SpeculationController",
    "jobs": "anabranch.jobs.kinds:JobKind",
    "losses": "anabranch.training.losses:Loss",
    "policies": "anabranch.serving.policies:Policy",
    "proposers": "anabranch.serving.speculation:Proposer",
    "strategies": "anabranch.federated.strategies:Strategy",
    "tasks": "anabranch.training.tasks:Task",
    "verifiers": "anabranch.serving.speculation:Verifier",
}
"""Kind -> ``package:BaseClass``. The package (with its modules) is searched for subclasses."""


def base_class(kind: str) -> type[Any]:
    """The class that every plug-in of this kind extends."""
    if kind not in KINDS:
        raise UnknownName("kind", kind, KINDS)
    package, _, attribute = KINDS[kind].partition(":")
    return getattr(importlib.import_module(package), attribute)


def available(kind: str) -> dict[str, type[Any]]:
    """All plug-ins of a kind by name, sorted."""
    base = base_class(kind)
    package = importlib.import_module(KINDS[kind].partition(":")[0])
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
    for entry_point in entry_points(group=f"anabranch.{kind}"):
        entry_point.load()
    found = {cls.name: cls for cls in _concrete_subclasses(base)}
    return dict(sorted(found.items()))


def get(kind: str, name: str) -> type[Any]:
    """One plug-in by name; :class:`UnknownName` lists what there is."""
    found = available(kind)
    if name not in found:
        raise UnknownName(kind, name, found)
    return found[name]


def summary(cls: type[Any]) -> str:
    """The first sentence of a plug-in's docstring."""
    return (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ")


def _concrete_subclasses(base: type[Any]) -> list[type[Any]]:
    found = []
    for cls in base.__subclasses__():
        if not inspect.isabstract(cls) and vars(cls).get("name"):
            found.append(cls)
        found.extend(_concrete_subclasses(cls))
    return found
