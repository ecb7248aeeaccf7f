"""The code in the documentation runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from anabranch.evaluation.testbeds import digits
from anabranch.federated import splits

PAGE = Path(__file__).parents[2] / "docs" / "federation.md"


def blocks():
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)


def test_the_first_example(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(blocks()[0].replace("rounds=30", "rounds=2"), {})
    accuracy, _, _ = map(float, capsys.readouterr().out.split())
    assert 0 < accuracy < 1


def test_the_method_that_is_written_there():
    names: dict[str, Any] = {
        "model": digits.perceptron(),
        "local": digits.local(steps=2),
        "sites": digits.sites(splits.iid(60, 3)),
    }
    setup = """
import torch
from anabranch.federated import Client, Federation, Server, Simulation, Sync
from anabranch.federated.shared import shared_tensors
"""
    start = {name: value.clone() for name, value in names["model"].state_dict().items()}
    exec(setup + blocks()[1].replace("Sync(20)", "Sync(2)"), names)
    assert names["result"].version == 2
    assert any(not torch.equal(start[n], t) for n, t in names["median"].tensors.items())
