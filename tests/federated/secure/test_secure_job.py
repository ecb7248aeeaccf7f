"""A secure sum as a key of a job, in simulation and over a network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from anabranch.errors import ConfigurationError
from anabranch.federated import Federation
from anabranch.federated.job import load_job
from anabranch.federated.local import LocalTraining
from anabranch.federated.running import federate
from anabranch.federated.runtimes.network import Network, join, work
from anabranch.federated.secure import Secure, SecureSync
from anabranch.federated.shared import shared_tensors
from anabranch.federated.strategies import FedAvg
from tests.federated.network.places import in_threads
from tests.federated.network.test_cli import JOB, RECIPE
from tests.federated.quadratics import Point, bowls, local, places
from tests.training.tiny_base import write_base


@pytest.fixture
def job(tmp_path: Path) -> Path:
    torch.set_num_threads(1)
    (tmp_path / "tiny.yaml").write_text(RECIPE.format(base=write_base(tmp_path / "base")))
    (tmp_path / "job.yaml").write_text(JOB)
    return tmp_path / "job.yaml"


def test_a_job_with_and_without(job: Path, tmp_path: Path) -> None:
    reports = []
    for override in ("secure=false", "secure=true"):
        outcome = federate(load_job(job, [override]), tmp_path / override)
        weights = load_file(outcome.saved / "adapter_model.safetensors")
        assert any(bool(tensor.any()) for name, tensor in weights.items() if "lora_B" in name)
        reports.append(json.loads((tmp_path / override / "report.json").read_text()))
    kinds = {row["kind"] for row in reports[1]["traffic"]}
    assert kinds == {"keys", "shares", "train", "unmask"}
    assert reports[1]["history"][-1]["sites"] == 2 and not reports[1]["incidents"]
    # Tasks have other numbers, and so other orders of the data; nothing else differs.
    losses = [report["history"][-1]["valid/loss"] for report in reports]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_keys_become_parts(job: Path) -> None:
    made = load_job(job, ["secure={threshold: 3, bits: 32}"])
    strategy = made.make_strategy()
    assert isinstance(strategy, Secure) and strategy.options.threshold == 3
    assert strategy.options.numbers.fraction == 16
    assert isinstance(made.make_schedule(), SecureSync)
    assert made.resolved()["secure"] == {"threshold": 3, "bits": 32, "fraction": None}
    assert isinstance(made.make_local(None), LocalTraining)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("strategy=scaffold", "scaffold needs more than the weighted mean"),
        ("schedule={name: buffered}", "use the schedule sync, not buffered"),
        ("schedule={name: deadline, seconds: 3}", "use the schedule sync, not deadline"),
        ("codec=[{name: quantise, bits: 8}]", "Quantise.* cannot encode masked updates"),
        ("codec=[{name: top_k, keep: 0.1}]", "TopK.* cannot encode masked updates"),
        ("tree=2", "send to the coordinator only"),
        ("secure={threshold: 0.3}", "threshold is a number of sites"),
        ("secure={bits: 16}", "bits"),
        ("secure={thresh: 2}", "no such option"),
    ],
)
def test_what_is_refused_before_anything_is_loaded(job: Path, override: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        load_job(job, ["secure=true", override])


def over_network(tmp_path: Path, sites: int, **options):
    strategy = Secure(FedAvg())
    network = Network(
        tmp_path / "network", clients=sites, insecure=True, join_timeout=20.0, **options
    )
    return Federation(
        strategy.server(shared_tensors(Point(5))),
        strategy.client(local()),
        strategy.schedule(2),
        network,
        store=tmp_path / "run",
    )


def remote(federation: Federation, tmp_path: Path, index: int, bowl, watch=lambda *_: None):
    """A site that works until the run is over, to be called in a thread."""
    invitation, folder = federation.runtime.invite(), tmp_path / f"c{index}"  # type: ignore[attr-defined]

    def run():
        member = join(invitation, folder, f"c{index}", 1)
        client = Secure(FedAvg()).client(local())
        return work(member, folder, client, [bowl], Point(5), watch=watch)

    return run


def test_over_a_network(tmp_path: Path) -> None:
    made, federation = bowls(3), over_network(tmp_path, 3)
    sites = in_threads(
        *(remote(federation, tmp_path, index, bowl) for index, bowl in enumerate(made))
    )
    result = federation.run()
    assert [one.end() for one in sites] == ["finished"] * 3
    assert len(result.incidents) == 0 and result.metrics["sites"] == 3
    plain = FedAvg().simulate(Point(5), local(), places(made), rounds=2)
    plain.run()
    for name, tensor in plain.server.tensors.items():
        assert torch.allclose(federation.server.tensors[name], tensor, atol=1e-6)


def test_a_site_that_dies_in_a_round_over_a_network(tmp_path: Path) -> None:
    """Its masks are in the others' updates, and are taken out with shares of its key."""
    made, federation = bowls(4), over_network(tmp_path, 4, absent_after=1.5)

    def die(task, reply):
        if task.kind == "train":
            raise KeyboardInterrupt

    sites = in_threads(
        *(
            remote(federation, tmp_path, index, bowl, *([die] if index == 1 else []))
            for index, bowl in enumerate(made)
        )
    )
    result = federation.run()
    assert [one.end() for index, one in enumerate(sites) if index != 1] == ["finished"] * 3
    assert result.incidents.count("left", "c1") == 1
    assert [row["sites"] for row in result.history] == [3, 3]
    left = [site for site in places(made) if site.name != "c1"]
    plain = FedAvg().simulate(Point(5), local(), left, rounds=2)
    plain.run()
    for name, tensor in plain.server.tensors.items():
        assert torch.allclose(federation.server.tensors[name], tensor, atol=1e-6)
