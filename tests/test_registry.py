"""Plug-ins are found without being registered, and a wrong name teaches the right ones."""

from __future__ import annotations

from importlib.metadata import EntryPoint, EntryPoints

import pytest

from anabranch import registry
from anabranch.errors import UnknownName
from anabranch.serving.policies import Policy


def test_policies_are_found_by_name() -> None:
    assert {"orca", "prefill_first", "splitfuse"} <= set(registry.available("policies"))
    for cls in registry.available("policies").values():
        assert issubclass(cls, Policy)
        assert registry.summary(cls).endswith(".")


def test_a_wrong_name_gets_a_hint_and_the_list() -> None:
    with pytest.raises(UnknownName, match=r"did you mean 'splitfuse'.*orca, prefill_first"):
        registry.get("policies", "splitfuze")
    with pytest.raises(UnknownName, match="did you mean 'policies'"):
        registry.available("policy")


def test_another_package_adds_one_by_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("mine", "tests.example_policy:Mine", "anabranch.policies")

    def entry_points(group: str) -> EntryPoints:
        return EntryPoints([entry] if group == "anabranch.policies" else [])

    monkeypatch.setattr(registry, "entry_points", entry_points)
    assert registry.get("policies", "mine").__name__ == "Mine"


def test_a_subclass_that_inherits_its_name_takes_no_place() -> None:
    from anabranch.federated.strategies import FedAvg

    class Variation(FedAvg):
        """Only its author knows it."""

    assert Variation.name == "fedavg"
    assert registry.get("strategies", "fedavg") is FedAvg
