"""Adapters: small trainable changes to a frozen base, in the checkpoint format of PEFT.

Methods that PEFT lacks, a catalogue of PEFT's and ours, and one way to build, size, store and merge
any of them belong here; training them belongs to :mod:`anabranch.training`. Importing this package
makes our methods known to PEFT.
"""

from anabranch.adapters.base import AdapterConfig, Branch, Site, Tuner
from anabranch.adapters.budget import fit_budget
from anabranch.adapters.building import build
from anabranch.adapters.catalogue import (
    catalogue,
    coverage_markdown,
    method,
    trainable_parameters,
)
from anabranch.adapters.errors import AdapterError, AdapterMismatch, NotMergeable
from anabranch.adapters.info import MethodInfo, Size
from anabranch.adapters.merging import merge
from anabranch.adapters.storage import load, save
from anabranch.adapters.targets import resolve_targets

__all__ = [
    "AdapterConfig",
    "AdapterError",
    "AdapterMismatch",
    "Branch",
    "MethodInfo",
    "NotMergeable",
    "Site",
    "Size",
    "Tuner",
    "build",
    "catalogue",
    "coverage_markdown",
    "fit_budget",
    "load",
    "merge",
    "method",
    "resolve_targets",
    "save",
    "trainable_parameters",
]

catalogue()  # registers our methods with PEFT
