"""Methods as Flower strategies: the parameters of the simulation, through flwr's own objects."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("flwr", reason="Flower is not installed; it needs an environment of its own")

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import Strategy as FlwrStrategy

from anabranch import adapters, registry
from anabranch.errors import ConfigurationError
from anabranch.evaluation.testbeds import digits
from anabranch.federated import Simulation, Site, splits
from anabranch.federated.aggregation import Flag
from anabranch.federated.core import Federation
from anabranch.federated.errors import FederationError
from anabranch.federated.runtimes.flower import answer, to_flower_strategy
from anabranch.federated.runtimes.flower.strategy import from_arrays, to_arrays
from anabranch.federated.scheduling import Uniform
from anabranch.federated.shared import shared_tensors
from anabranch.federated.strategies import FedAvg
from tests.federated.flower.grids import LocalGrid

ROUNDS = 3
NODES = (11, 12, 13)
METHODS = [
    "fedavg",
    "fedprox",
    "fedadam",
    "fedavg_m",
    "scaffold_m",
    "scallion",
    "scafcom",
    "fedamd",
    "fedkseed",
    "ferret",
    "fedit",
    "fed-sb",
]


def sites():
    labels = digits.images()[0].labels[:120].tolist()
    parts = splits.dirichlet(labels, len(NODES), 0.5, min_size=10)
    return [Site(str(node), list(part)) for node, part in zip(NODES, parts, strict=True)]


def network(method):
    wanted = method.adapter
    made = digits.perceptron()
    return adapters.build(wanted, made, r=4, target_modules=["0", "2"]) if wanted else made


def flower(method, rounds=ROUNDS, nodes=NODES, **options):
    """The strategy, and a grid whose nodes do what the method's clients do."""
    model, data = network(method), {site.name: site.data for site in sites()}
    client = method.client(digits.local(steps=3))
    needs_model = type(method).begin is not FedAvg.begin
    strategy = to_flower_strategy(
        method.begin(model) if needs_model else method, rounds, min_available_nodes=2, **options
    )

    def work(message, context):
        return answer(message, context, client, data[str(context.node_id)], model)

    return strategy, LocalGrid(nodes, work), to_arrays(shared_tensors(model))


def play(strategy, grid, arrays, rounds=ROUNDS):
    """Flower's loop without evaluation and logs."""
    number, before = 0, arrays
    while strategy.coordinator is None or strategy.coordinator.version < rounds:
        number += 1
        messages = strategy.configure_train(number, arrays, ConfigRecord(), grid)
        replies = grid.send_and_receive(messages)
        made, figures = strategy.aggregate_train(number, replies)
        if made is not None:
            arrays = made
            assert figures is not None and "seconds" in figures
        assert number < 3 * rounds
    assert before is not arrays
    return from_arrays(arrays)


def simulated(method, rounds=ROUNDS, sampler=None):
    model = network(method)
    schedule = method.schedule(rounds, sampler)
    local = digits.local(steps=3)
    made = Federation(
        method.begin(model), method.client(local), schedule, Simulation(sites(), model)
    )
    made.run()
    return made


@pytest.mark.parametrize("name", METHODS)
def test_equal_parameters_bit_for_bit(name):
    method = registry.get("strategies", name)
    expected = simulated(method()).server.tensors
    got = play(*flower(method()))
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(got[key], value), key


def test_sampling_and_rules_are_the_same():
    method = FedAvg(rule=Flag())
    expected = simulated(method, sampler=Uniform(2))
    strategy, grid, arrays = flower(method, sampler=Uniform(2))
    got = play(strategy, grid, arrays)
    assert all(torch.equal(got[key], value) for key, value in expected.server.tensors.items())
    asked = [message.metadata.dst_node_id for message in grid.pushed]
    accounts = expected.coordinator.state.ledger.by("version", "client")
    assert sorted(map(str, asked)) == sorted(client for _, client in accounts)
    ledger = strategy.coordinator.state.ledger
    assert ledger.total().payload == expected.coordinator.state.ledger.total().payload


def test_the_whole_loop_of_flower_runs_it():
    strategy, grid, arrays = flower(FedAvg(), fraction_evaluate=0.0)
    assert isinstance(strategy, FlwrStrategy)
    result = strategy.start(grid, arrays, num_rounds=ROUNDS)
    expected = simulated(FedAvg()).server.tensors
    assert all(torch.equal(v, expected[n]) for n, v in from_arrays(result.arrays).items())
    assert sorted(result.train_metrics_clientapp) == [1, 2, 3]
    with pytest.raises(ConfigurationError, match="made for 3 versions"):
        strategy.configure_train(4, result.arrays, ConfigRecord(), grid)


def test_an_app_of_ones_own_answers_with_arrays_and_examples():
    def own(message, context):
        start = from_arrays(message.content.array_records["arrays"])
        change = {name: torch.full_like(x, context.node_id) for name, x in start.items()}
        metrics = MetricRecord({"num-examples": context.node_id, "loss": 0.5})
        return Message(
            RecordDict({"arrays": to_arrays(change), "metrics": metrics}), reply_to=message
        )

    strategy = to_flower_strategy(FedAvg(), 1)
    arrays = to_arrays({"x": torch.zeros(2, 3), "scalar": torch.zeros(())})
    got = play(strategy, LocalGrid((1, 3), own), arrays, rounds=1)
    assert torch.equal(got["x"], torch.full((2, 3), 2.5)) and got["scalar"] == 2.5
    assert strategy.coordinator.state.history[-1]["loss"] == 0.5


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda m: Message(RecordDict({}), reply_to=m), "does not say its num-examples"),
        (
            lambda m: Message(
                RecordDict(
                    {"a": to_arrays({}), "b": to_arrays({}), "m": MetricRecord({"num-examples": 1})}
                ),
                reply_to=m,
            ),
            "2 array records",
        ),
        (
            lambda m: Message(
                RecordDict(
                    {
                        "a": to_arrays({"other": torch.zeros(1)}),
                        "m": MetricRecord({"num-examples": 1}),
                    }
                ),
                reply_to=m,
            ),
            "is absent",
        ),
        (None, "did not answer in time"),
    ],
)
def test_a_bad_reply_is_an_incident_and_the_others_count(spoil, says):
    strategy, grid, arrays = flower(FedAvg(), rounds=1)
    replies = []
    for message in strategy.configure_train(1, arrays, ConfigRecord(), grid):
        grid.push_messages([message])
        if message.metadata.dst_node_id != 12:
            replies.append(grid.reply(message))
        elif spoil is not None:
            replies.append(spoil(message))
    made, _ = strategy.aggregate_train(1, replies)
    assert made is not None
    (incident,) = strategy.coordinator.state.incidents
    assert incident.client == "12" and says in incident.message


def test_a_round_without_any_reply_makes_no_version_and_is_tried_again():
    strategy, grid, arrays = flower(FedAvg(), rounds=1)
    grid.push_messages(strategy.configure_train(1, arrays, ConfigRecord(), grid))
    assert strategy.aggregate_train(1, []) == (None, None)
    play(strategy, grid, arrays, rounds=1)


def test_a_node_that_goes_and_one_that_comes():
    strategy, grid, arrays = flower(FedAvg(), nodes=(11, 12), rounds=3)
    replies = grid.send_and_receive(strategy.configure_train(1, arrays, ConfigRecord(), grid))
    strategy.aggregate_train(1, replies)
    grid.there = [12, 13]
    second = strategy.configure_train(2, arrays, ConfigRecord(), grid)
    assert {m.metadata.dst_node_id for m in second} <= {12, 13}
    strategy.aggregate_train(2, grid.send_and_receive(second))
    third = strategy.configure_train(3, arrays, ConfigRecord(), grid)
    assert sorted(m.metadata.dst_node_id for m in third) == [12, 13]


def test_the_clients_own_error_reaches_the_incidents():
    def fails(message, context):
        raise FederationError("the disk is full")

    strategy = to_flower_strategy(FedAvg(), 1)
    grid = LocalGrid((1, 2), fails)
    arrays = to_arrays({"x": torch.zeros(2)})
    messages = strategy.configure_train(1, arrays, ConfigRecord(), grid)
    assert strategy.aggregate_train(1, grid.send_and_receive(messages)) == (None, None)
    assert "the disk is full" in next(iter(strategy.coordinator.state.incidents)).message


@pytest.mark.parametrize("name", ["fedcompass", "fedfix", "fedbuff", "fedasync", "dfedsam"])
def test_methods_without_rounds_are_refused(name):
    with pytest.raises(ConfigurationError, match="has no rounds with a server"):
        to_flower_strategy(registry.get("strategies", name)(), 3)


def test_bfloat16_is_refused_by_name():
    with pytest.raises(ConfigurationError, match="w is bfloat16"):
        to_arrays({"w": torch.zeros(2, dtype=torch.bfloat16)})


def test_nothing_was_sent():
    with pytest.raises(FederationError, match="configure_train comes first"):
        to_flower_strategy(FedAvg(), 1).aggregate_train(1, [])
    assert isinstance(to_arrays({}), ArrayRecord)
