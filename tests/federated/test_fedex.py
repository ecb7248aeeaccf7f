"""FedEx-LoRA: a version is the mean of the clients' models."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch import adapters
from anabranch.errors import ConfigurationError
from anabranch.federated import Buffered, DeviceProfile, Federation, Simulation, Sync, Uniform
from anabranch.federated.errors import AggregationError
from anabranch.federated.payload import encode
from anabranch.federated.shared import lent
from anabranch.federated.strategies.fedex import FedEx, Place, moved, places, residuals
from anabranch.federated.strategies.fedit import FedIT, aggregation_error
from tests import tiny
from tests.federated.adapted import local, logits, lora, same, sites
from tests.federated.helpers import Tamper, lost


def simulate(strategy=None, model=None, clients=3, rounds=3, **options):
    model = lora() if model is None else model
    strategy = FedEx() if strategy is None else strategy
    return strategy.simulate(model, local(), sites(clients), rounds=rounds, **options)


def effective(tensors, place, weights=None):
    weight = (weights or tensors)[place.weight].double()
    return weight + place.scale * tensors[place.b].double() @ tensors[place.a].double()


# The residual


@settings(max_examples=30, deadline=None)
@given(
    clients=st.integers(1, 5),
    rank=st.integers(1, 6),
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    data=st.data(),
)
def test_moved_weights_make_the_average_exact(clients, rank, rows, columns, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    shares = data.draw(st.lists(st.integers(1, 50), min_size=clients, max_size=clients))
    place = Place("a", "b", "w", 1.5)
    members = [
        {
            "a": torch.randn(rank, columns, generator=generator),
            "b": torch.randn(rows, rank, generator=generator),
        }
        for _ in shares
    ]
    base = {"w": torch.randn(rows, columns, generator=generator)}
    told = residuals([place], members, shares)
    after = moved(base, encode(told))
    total = sum(shares)
    mean = {
        n: sum(w / total * m[n].double() for w, m in zip(shares, members, strict=True))
        for n in ("a", "b")
    }
    wanted = sum(
        w / total * effective(m, place, base) for w, m in zip(shares, members, strict=True)
    )
    assert torch.allclose(effective(mean, place, after), wanted, atol=1e-4)
    values = sum(tensor.numel() for tensor in told.values())
    if clients == 1:
        assert not told and torch.equal(after["w"], base["w"])
    else:
        assert values == min((clients - 1) * rank * (rows + columns), rows * columns)


# The run


def test_every_version_is_the_mean_of_the_clients_models():
    model = lora()
    federation = simulate(model=model)
    found, server = places(model), federation.server
    assert [place.scale for place in found] == [2.0] * len(found) and len(found) == 2 * len(
        model.get_submodule("base_model.model.model.layers")
    )
    before, checked = [server.weights], []

    def watch(coordinator):
        members = list(server.average.latest.values())
        for place in found:
            wanted = sum(effective(m, place, before[-1]) for m in members) / len(members)
            assert torch.allclose(effective(server.tensors, place), wanted, atol=1e-6)
        error = aggregation_error(members, [1.0] * len(members))
        checked.append(error)
        before.append(server.weights)
        return {}

    federation.coordinator.watch = watch
    history = federation.run().history
    assert [figures["residual"] for figures in history] == checked and min(checked) > 1e-3
    assert not same(before[0], before[-1])


def test_the_models_base_is_as_it_was_and_versions_can_be_lent():
    model = lora()
    frozen = {n: p.detach().clone() for n, p in model.named_parameters()}
    start = logits(model)
    federation = simulate(model=model)
    federation.run()
    assert all(torch.equal(frozen[n], p) for n, p in model.named_parameters())
    with lent(model, federation.server.tensors):
        tuned = logits(model)
        merged = adapters_merged(model)
    assert not torch.allclose(tuned, start) and torch.allclose(tuned, merged, atol=1e-5)


def adapters_merged(model):
    model.merge_adapter()
    try:
        return logits(model)
    finally:
        model.unmerge_adapter()


def test_sites_have_the_servers_weights_whatever_they_missed():
    for options in (
        {"schedule": Sync(6, Uniform(2))},
        {"schedule": Sync(5)},
    ):
        federation = simulate(clients=4, **options)
        federation.runtime.faults = Tamper({("c1", 2): lost})
        federation.patience = 50
        versions = [federation.server.weights]
        federation.coordinator.watch = lambda made, seen=versions: (
            seen.append(made.server.weights) or {}
        )
        federation.run()
        for name in ("c0", "c1", "c2", "c3"):
            state = federation.runtime.node(name).state
            assert same(state["weights"], versions[state["version"]])


def test_one_client_is_fedit():
    ours, theirs = simulate(clients=1), simulate(FedIT(upload="weights"), clients=1)
    ours.run(), theirs.run()
    assert same(ours.server.average.tensors, theirs.server.tensors)


def test_bytes_down_are_residuals_or_weights():
    federation = simulate(clients=3, rounds=3)
    result, server = federation.run(), federation.server
    adapter = sum(tensor.nbytes for tensor in server.average.tensors.values())
    ledger = [result.ledger.total(direction="down", version=v).payload / 3 for v in range(3)]
    assert ledger[0] < adapter + 1500  # a header, nothing to add yet
    values = sum(
        min(2 * 4 * sum(server.weights[p.weight].shape), server.weights[p.weight].numel())
        for p in server.places
    )
    expected = adapter + min(4 * values, server.size)
    assert expected < ledger[1] < expected + 3000
    up = result.ledger.total(direction="up")
    assert up.payload / up.messages < adapter + 1500


def test_a_site_that_lost_its_state_is_sent_everything_again():
    federation = simulate(rounds=4)

    def forget(task, reply):
        node = federation.runtime.node("c1")
        start = lora()
        weights = {p.weight: dict(start.named_parameters())[p.weight] for p in places(start)}
        node._personal["state"].update(
            weights={n: w.detach().clone() for n, w in weights.items()}, version=0
        )
        return [reply]

    federation.runtime.faults = Tamper({("c1", 1): forget})
    result = federation.run()
    assert result.version == 4
    one, other = (federation.runtime.node(name).state for name in ("c0", "c1"))
    assert one["version"] == other["version"] and same(one["weights"], other["weights"])


def test_late_replies_are_refused():
    profiles = [dataclasses.replace(s, profile=DeviceProfile(i + 1)) for i, s in enumerate(sites())]
    federation = FedEx().simulate(lora(), local(), profiles, schedule=Buffered(4, 1))
    with pytest.raises(ConfigurationError, match="barrier"):
        federation.run()


def test_other_adapters_are_refused():
    strategy = FedEx()
    runtime = Simulation(sites(1), lora(alpha=16))
    federation = Federation(
        strategy.begin(lora()), strategy.client(local()), Sync(1), runtime, patience=0
    )
    with pytest.raises(AggregationError, match=r"AdapterMismatch: c0 .* lora_alpha"):
        federation.run()


def test_what_has_no_exact_residual_is_refused():
    with pytest.raises(ConfigurationError, match="none is trained"):
        FedEx().begin(tiny.llama())
    with pytest.raises(ConfigurationError, match="lora_embedding"):
        FedEx().begin(lora(target_modules=["q_proj", "embed_tokens"]))
    with pytest.raises(ConfigurationError, match="lora_magnitude_vector"):
        FedEx().begin(lora(use_dora=True))
    with pytest.raises(ConfigurationError, match="begins with a model"):
        FedEx().server({})


def test_adapters_of_half_precision_bases_keep_residuals_in_float32():
    model = adapters.build("lora", tiny.llama().to(torch.bfloat16), r=2, target_modules=["q_proj"])
    server = FedEx().begin(model)
    assert all(weight.dtype is torch.float32 for weight in server.weights.values())
