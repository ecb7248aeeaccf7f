"""FedIT: averaged adapters, how inexact that is, and what is stored of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel

from anabranch.errors import ConfigurationError
from anabranch.evaluation.testbeds import digits
from anabranch.federated import Federation, Simulation, Sync
from anabranch.federated.adapter_agreement import describe_adapter
from anabranch.federated.categories import category_losses
from anabranch.federated.errors import AggregationError
from anabranch.federated.randomness import derive_seed
from anabranch.federated.shared import lent, shared_tensors
from anabranch.federated.strategies import FedAvg
from anabranch.federated.strategies.fed_lora import FFA
from anabranch.federated.strategies.fedit import FedIT, aggregation_error, save_versions
from anabranch.training.trainer import Trainer
from tests import tiny
from tests.federated.adapted import items, local, logits, lora, same, sites
from tests.federated.helpers import assert_killed_ends_the_same


def simulate(strategy=None, places=None, model=None, rounds=2, training=None, **options):
    return (strategy or FedIT()).simulate(
        model or lora(), training or local(), places or sites(), rounds=rounds, **options
    )


def factors(seed, members, r=2, rows=5, columns=7):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "x.lora_A.default.weight": torch.randn(r, columns, generator=generator),
            "x.lora_B.default.weight": torch.randn(rows, r, generator=generator),
        }
        for _ in range(members)
    ]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.lists(st.floats(0.1, 9.0), min_size=1, max_size=5))
def test_the_error_is_that_of_the_products(seed, weights):
    members = factors(seed, len(weights))
    share = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    a = torch.stack([m["x.lora_A.default.weight"].double() for m in members])
    b = torch.stack([m["x.lora_B.default.weight"].double() for m in members])
    products = torch.einsum("k,kor,kri->oi", share, b, a)
    averages = torch.einsum("k,kor->or", share, b) @ torch.einsum("k,kri->ri", share, a)
    expected = torch.linalg.norm(products - averages) / torch.linalg.norm(products)
    assert aggregation_error(members, weights) == pytest.approx(float(expected), abs=1e-7)


def test_equal_members_have_no_error_and_other_models_no_figure():
    (member,) = factors(0, 1)
    assert aggregation_error([member] * 3, [1.0, 2.0, 3.0]) == pytest.approx(0, abs=1e-12)
    assert aggregation_error([{"layer.weight": torch.ones(2, 2)}], [1.0]) is None
    nothing = {name: torch.zeros_like(tensor) for name, tensor in member.items()}
    assert aggregation_error([nothing, nothing], [1.0, 1.0]) == 0


def test_different_clients_make_it_inexact():
    federation = simulate()
    result = federation.run()
    assert all(row["aggregation_error"] > 1e-3 for row in result.history)
    assert set(federation.server.latest) == {"c0", "c1", "c2"}


def test_one_client_is_plain_training_bit_for_bit():
    places = sites(1)
    federation = simulate(FedIT(upload="weights"), places, rounds=1)
    federation.run()
    model = lora()
    options = local().options.model_copy(update={"seed": derive_seed(0, "client", "c0", 1)})
    trainer = Trainer(model, local().objective, options, places[0].data)
    for _ in range(trainer.total_steps):
        trainer.step(trainer.next_items())
    assert same(federation.server.tensors, shared_tensors(model))


def test_equal_clients_are_one_client():
    place = sites(1)[0]
    several = [type(place)(f"c{i}", place.data) for i in range(3)]
    full = local(optimizer="sgd", lr=0.1, batch=8, steps=1)
    one = simulate(places=[place], training=full)
    many = simulate(places=several, training=full)
    one.run(), many.run()
    for name, tensor in one.server.tensors.items():
        torch.testing.assert_close(tensor, many.server.tensors[name], rtol=1e-5, atol=1e-6)


def test_it_is_fedavg_over_the_adapter():
    ours, plain = simulate(FedIT(upload="weights")), simulate(FedAvg(upload="weights"))
    ours.run(), plain.run()
    assert same(ours.server.tensors, plain.server.tensors)
    changes = simulate(FedIT(upload="delta"))
    changes.run()
    for name, tensor in ours.server.tensors.items():
        torch.testing.assert_close(changes.server.tensors[name], tensor, rtol=1e-5, atol=1e-6)
    frugal = simulate(FedIT(diagnose=False))
    assert "aggregation_error" not in frugal.run().metrics and not frugal.server.latest


def test_compact_messages_are_the_values():
    model = lora()
    values = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    ledger = simulate(FedIT(compact=True), model=model).run().ledger
    up, down = (ledger.total(direction=direction) for direction in ("up", "down"))
    assert up.payload == up.messages * values
    assert down.payload == down.messages * (values + len(describe_adapter(model)))


def test_the_base_is_left_alone():
    model = lora()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    simulate(model=model).run()
    assert same(before, {n: p.detach() for n, p in model.named_parameters()})


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"alpha": 16}, "lora_alpha: not set in the run, 16 here"),
        ({"use_rslora": True}, "use_rslora: not set in the run, True here"),
        ({"lora_dropout": 0.1}, "lora_dropout"),
    ],
)
def test_another_adapter_is_refused_by_name(other, says):
    server = FedIT().begin(lora())
    runtime = Simulation(sites(1), lora(**other))
    federation = Federation(server, FedIT().client(local()), Sync(1), runtime, patience=0)
    with pytest.raises(AggregationError, match=f"AdapterMismatch: c0 has another adapter.*{says}"):
        federation.run()


def test_every_version_is_an_adapter_of_peft(tmp_path):
    model = lora()
    federation = simulate(model=model, watch=save_versions(model, tmp_path, clients=True))
    federation.run()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("0001", "0001-c0", "0001-c1", "0001-c2"),
        *("0002", "0002-c0", "0002-c1", "0002-c2"),
    ]
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path / "0002")
    with lent(model, federation.server.tensors):
        assert torch.equal(logits(loaded), logits(model))


def test_a_frozen_factor_makes_averages_exact():
    model = lora()
    federation = simulate(FFA(compact=True), model=model)
    result = federation.run()
    names = federation.server.tensors
    assert names and all(".lora_B." in name for name in names)
    up = result.ledger.total(direction="up")
    assert up.payload == up.messages * sum(tensor.nbytes for tensor in names.values())
    assert all(p.requires_grad for n, p in model.named_parameters() if ".lora_" in n)
    # With A of all parties the same, the average of products is the product of averages.
    frozen = {n: p.detach() for n, p in model.named_parameters() if ".lora_A." in n}
    members = [{**frozen, **member} for member in federation.server.latest.values()]
    assert aggregation_error(members, [1.0, 2.0, 3.0]) < 1e-6


def test_ffa_without_a_factor_to_freeze_says_that_it_is_fedit(caplog):
    model = tiny.llama()
    assert FFA().begin(model).tensors.keys() == shared_tensors(model).keys()
    assert "freezes LoRA's A, and this model has none: this is fedit" in caplog.text


def test_another_frozen_factor_is_refused():
    strategy = FFA()
    runtime = Simulation(sites(1), lora(seed=1))
    federation = Federation(
        strategy.begin(lora(seed=0)), strategy.client(local()), Sync(1), runtime, patience=0
    )
    with pytest.raises(AggregationError, match=r"AdapterMismatch: c0 .* frozen: \w+ in the run"):
        federation.run()


def test_killed_at_any_input(tmp_path):
    assert_killed_ends_the_same(lambda store: simulate(store=store), tmp_path, (1, 3, 5))


def test_resumed_versions_are_kept(tmp_path):
    model = lora()
    make = lambda: simulate(  # noqa: E731
        model=model, store=tmp_path / "run", watch=save_versions(model, tmp_path / "versions")
    )
    make().run()
    written = (tmp_path / "versions" / "0001" / "adapter_model.safetensors").stat().st_mtime_ns
    make().resume()
    again = (tmp_path / "versions" / "0001" / "adapter_model.safetensors").stat().st_mtime_ns
    assert written == again


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("constant", [1, 1, 1, 1]),
        ("linear", [1, 0.75, 0.5, 0.25]),
        ("cosine", [1, 0.854, 0.5, 0.146]),
    ],
)
def test_the_rate_falls_from_round_to_round(decay, expected):
    scales = []

    def note(task, reply):
        scales.append(task.work.lr_scale)
        return [reply]

    federation = FedAvg().simulate(
        digits.perceptron(),
        digits.local(batch=8, steps=1),
        [sites(1)[0].__class__("c0", list(range(20)))],
        schedule=Sync(4, decay=decay),
    )
    federation.runtime.faults = note
    federation.run()
    assert scales == pytest.approx(expected, abs=1e-3)


def test_decays_that_do_not_exist():
    with pytest.raises(ConfigurationError, match="decay is linear, cosine, constant, not 'exp'"):
        Sync(4, decay="exp")


def test_losses_by_category():
    held_out = items(4, 1, "a") + items(4, 2, "b") + items(4, 3, "c")
    trained_on = items(3, 4, "a") + items(3, 5, "b")
    trainer = Trainer(lora(), local().objective, local().options, trained_on, held_out)
    found = category_losses(trainer, held_out, trained_on)
    parts = {"a": held_out[:4], "b": held_out[4:8], "c": held_out[8:]}
    single = {name: trainer.evaluate(part)["loss"] for name, part in parts.items()}
    assert {name: found[f"loss/{name}"] for name in parts} == single
    assert found["loss/seen"] == pytest.approx((single["a"] + single["b"]) / 2)
    assert found["loss/unseen"] == single["c"]
    assert category_losses(trainer, held_out[:4], trained_on) == {}


def test_a_client_without_data_does_not_count():
    places = [*sites(2), sites(1)[0].__class__("empty", [])]
    with_empty, without = simulate(places=places), simulate(places=sites(2))
    with_empty.run(), without.run()
    assert set(with_empty.server.latest) == {"c0", "c1"}
