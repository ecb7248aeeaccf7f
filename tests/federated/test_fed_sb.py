"""Fed-SB: exact averages between frozen factors, how they are agreed on, and what is sent."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch import adapters
from anabranch.adapters import lora_sb
from anabranch.errors import ConfigurationError
from anabranch.federated import Buffered, Federation, Simulation, Site, Sync
from anabranch.federated.codecs import TopK
from anabranch.federated.errors import AggregationError, PayloadMismatch
from anabranch.federated.messages import Reply
from anabranch.federated.randomness import derive_seed
from anabranch.federated.server import Update
from anabranch.federated.shared import lent, shared_tensors
from anabranch.federated.strategies.fed_sb import FedSB, blocks_of, flat_blocks
from anabranch.federated.strategies.fedit import aggregation_error
from anabranch.federated.strategies.first_gradient import sum_of_sketches
from anabranch.training.trainer import Trainer
from tests import tiny
from tests.federated.adapted import local, logits, same, sites
from tests.federated.helpers import Tamper, assert_killed_ends_the_same

LAYERS = 4  # q and v of two layers


def network(r=6, **options):
    return adapters.build(
        "lora_sb", tiny.llama(), r=r, target_modules=["q_proj", "v_proj"], **options
    )


def simulate(strategy=None, places=None, model=None, rounds=3, training=None, **options):
    return (strategy or FedSB()).simulate(
        model or network(), training or local(), places or sites(), rounds=rounds, **options
    )


def initialised(r=6):
    model = network(r)
    generator = torch.Generator().manual_seed(1)
    gradients = {p.site: torch.randn(p.shape, generator=generator) for p in lora_sb.places(model)}
    lora_sb.initialise(model, gradients, 1e-2)
    return model


def update(client, core, kind="train", examples=5, staleness=0):
    return Update(1, client, kind, 0, {"R": core}, examples, staleness, 0.0, 0.0, {})


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 999),
    st.lists(st.integers(1, 50), min_size=1, max_size=5),
)
def test_the_average_of_cores_is_the_average_of_updates(seed, examples):
    server = FedSB(init="random").begin(network())
    generator = torch.Generator().manual_seed(seed)
    cores = torch.randn(len(examples), 36 * LAYERS, generator=generator)
    before = dict(server.cores)
    acc = None
    for index, (core, n) in enumerate(zip(cores, examples, strict=True)):
        acc = server.fold(acc, update(f"c{index}", core, examples=n))
    server.commit(acc)
    share = torch.tensor(examples, dtype=torch.float64) / sum(examples)
    for number, place in enumerate(lora_sb.places(network())):
        a, b = server.factors[place.a].double(), server.factors[place.b].double()
        moved = (server.cores[place.core] - before[place.core]).double()
        each = cores.double().reshape(-1, LAYERS, 6, 6)[:, _position(server, place, number)]
        products = torch.einsum("k,or,krs,si->oi", share, b, each, a)
        assert float((b @ moved @ a - products).abs().max()) < 1e-6 * max(
            1, float(cores.abs().max())
        )


def _position(server, place, number):
    return sorted(server.cores).index(place.core)


def test_averaged_lora_factors_are_not_exact_on_the_same_cores():
    """The same updates as LoRA factors (A moves, too) miss the average of products."""
    generator = torch.Generator().manual_seed(0)
    members = [
        {
            "x.lora_A.w": torch.randn(6, 20, generator=generator),
            "x.lora_B.w": torch.randn(20, 6, generator=generator),
        }
        for _ in range(3)
    ]
    assert aggregation_error(members, [1.0, 2.0, 3.0]) > 1e-3


def test_compact_messages_are_four_bytes_a_number():
    ledger = simulate(FedSB(init="random", compact=True)).run().ledger
    up, down = (ledger.total(direction=direction) for direction in ("up", "down"))
    assert up.payload == up.messages * 4 * 6**2 * LAYERS
    assert down.payload == down.messages * (4 * 6**2 * LAYERS + 8)


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("sketch", ["low_rank", "signs"])
def test_clients_make_the_factors_together(sketch, compact):
    federation = simulate(FedSB(sketch=sketch, compact=compact, init_samples=8), rounds=2)
    result = federation.run()
    server = federation.server
    kinds = {key: t.messages for key, t in result.ledger.by("direction", "kind").items()}
    assert kinds == {
        ("down", "train"): 6,
        ("up", "train"): 6,
        ("down", "init"): 3,
        ("up", "init"): 3,
        ("down", "factors"): 3,
        ("up", "factors"): 3,
    }
    assert server.ready and not len(result.incidents)
    for place in lora_sb.places(network()):
        a, b = server.factors[place.a], server.factors[place.b]
        torch.testing.assert_close(b.T @ b, torch.eye(6), rtol=0, atol=1e-5)
        torch.testing.assert_close(a @ a.T, torch.eye(6), rtol=0, atol=1e-5)


def test_whole_sketches_are_the_first_step_of_pooled_training():
    """With all examples of equal clients: B R A is the best form of -lr sign(G) of the pool."""
    model, places = network(), sites(3, 8)
    training = local(batch=8)
    pooled = [item for place in places for item in place.data]
    objective = training.objective
    objective.check(model)
    counts = objective.denominators(pooled)
    losses = [
        lambda batch=batch: objective.loss(model, batch, counts).loss
        for batch in objective.plan(pooled)
    ]
    gradients = lora_sb.estimate_gradients(model, losses)
    # 2 r columns are enough for these narrow modules to be sent whole.
    federation = simulate(FedSB(init_samples=8), places, network(r=12), rounds=1, training=training)
    federation.run()
    server = federation.server
    for place in lora_sb.places(model):
        b, core, a = lora_sb.first_step(gradients[place.site], 12, 1e-3)
        ours = server.factors[place.b] @ server.cores[place.core] @ server.factors[place.a]
        difference = (ours - b @ core @ a).norm() / ours.norm()
        assert difference < 0.05, place  # a few signs of entries near zero may differ


def test_a_low_rank_sketch_is_the_best_one():
    place = lora_sb.Place("m", (40, 30), "R", "A", "B")
    matrix = torch.randn(40, 30, generator=torch.Generator().manual_seed(2))
    left, right = lora_sb.truncated_svd(matrix, 4)
    acc = sum_of_sketches(None, {"0.left": left, "0.right": right}, [place], 2.0, "c")
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    best = u[:, :4] @ torch.diag(s[:4]) @ v[:4]
    error = (acc["sums"]["m"] / 2 - matrix).norm() / (best - matrix).norm()
    assert 1 - 1e-4 <= error < 1.01 and acc["weights"] == 2.0
    with pytest.raises(PayloadMismatch, match=r"gradient of m should be \[40, 30\], but is absent"):
        sum_of_sketches(None, {}, [place], 1.0, "c")
    with pytest.raises(PayloadMismatch, match=r"but is \[30, 40\]"):
        sum_of_sketches(None, {"0.whole": matrix.T}, [place], 1.0, "c")


def elsewhere(model, places, rounds=3):
    """A federation whose server has a model that the sites have not seen."""
    strategy = FedSB(init="public")
    runtime = Simulation(places, network())
    return Federation(strategy.begin(model), strategy.client(local()), Sync(rounds), runtime)


def test_one_client_trains_as_the_trainer_does():
    model, places = initialised(), sites(1)
    federation = elsewhere(model, places, rounds=1)
    federation.run()
    plain = initialised()
    # The first task asks for the factors; its follow-up, of kind factors, trains.
    options = local().options.model_copy(update={"seed": derive_seed(0, "client", "c0", 1, 1)})
    trainer = Trainer(plain, local().objective, options, places[0].data)
    for _ in range(trainer.total_steps):
        trainer.step(trainer.next_items())
    for name, tensor in shared_tensors(plain).items():
        torch.testing.assert_close(federation.server.tensors[name], tensor, rtol=1e-5, atol=1e-6)


def test_factors_of_the_server_go_to_every_client_once():
    result = elsewhere(initialised(), sites()).run()
    kinds = {kind: t.messages for (kind,), t in result.ledger.by("kind").items()}
    assert kinds == {"train": 2 * 9, "factors": 2 * 3}
    with pytest.raises(ConfigurationError, match="whose R is zero"):
        FedSB(init="public").begin(network())


def test_a_client_that_joins_late_gets_the_factors():
    federation = simulate(schedule=Buffered(6, 2), places=sites(4))
    result = federation.run()
    assert result.version == 6 and federation.server.ready
    assert result.ledger.by("kind")["factors",].messages == 2 * 4


def test_random_factors_must_be_the_same():
    server = FedSB(init="random").begin(network(seed=1))
    runtime = Simulation(sites(1), network(seed=1))
    Federation(server, FedSB(init="random").client(local()), Sync(1), runtime).run()
    for other, says in (
        (network(seed=2), "seed: 1 in the run, 2 here"),
        (network(r=5, seed=1), "r: 6 in the run, 5 here"),
        (_turned(network(seed=1)), "holds other frozen factors than the run"),
    ):
        federation = Federation(
            FedSB(init="random").begin(network(seed=1)),
            FedSB(init="random").client(local()),
            Sync(1),
            Simulation(sites(1), other),
            patience=0,
        )
        with pytest.raises(AggregationError, match=f"AdapterMismatch: c0 .*{says}"):
            federation.run()


def _turned(model):
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith(".A"):
                buffer.neg_()
    return model


def test_ranks_may_differ():
    strategy = FedSB(init="random", ranks={"c0": 2, "c1": 4}, compact=True, weighting="uniform")
    federation = simulate(strategy, rounds=1)
    sizes = {}

    def note(task, reply):
        sizes[task.client] = len(reply.body)
        return [reply]

    federation.runtime.faults = note
    federation.run()
    assert sizes == {"c0": 16 * LAYERS, "c1": 64 * LAYERS, "c2": 144 * LAYERS}


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_entries_are_averaged_over_those_who_have_them(seed, ranks):
    names = [f"c{i}" for i in range(len(ranks))]
    server = FedSB(init="random", ranks=dict(zip(names, ranks, strict=True))).begin(network())
    generator = torch.Generator().manual_seed(seed)
    replies = [torch.randn(r * r * LAYERS, generator=generator) for r in ranks]
    acc = None
    for name, reply in zip(names, replies, strict=True):
        one = server.fold(None, update(name, reply, examples=3))
        acc = one if acc is None else server.merge(acc, one)
    server.commit(acc)
    name = sorted(server.cores)[0]
    expected = torch.zeros(6, 6)
    for row in range(6):
        for column in range(6):
            owners = [
                reply[: r * r].reshape(r, r)[row, column]
                for r, reply in zip(ranks, replies, strict=True)
                if max(row, column) < r
            ]
            if owners:
                expected[row, column] = torch.stack(owners).mean()
    torch.testing.assert_close(server.cores[name], expected, rtol=1e-5, atol=1e-6)


def test_small_clients_leave_the_rest_of_the_matrix_alone():
    model = initialised()
    federation = simulate(FedSB(init="public", ranks={f"c{i}": 2 for i in range(3)}), model=model)
    before = dict(federation.server.cores)
    federation.run()
    for name, core in federation.server.cores.items():
        assert torch.equal(core[2:], before[name][2:]) and torch.equal(
            core[:, 2:], before[name][:, 2:]
        )
        assert not torch.equal(core[:2, :2], before[name][:2, :2])


def test_blocks_and_vectors():
    like = {"b": torch.zeros(4, 4), "a": torch.zeros(4, 4)}
    vector = torch.arange(18.0)
    found = blocks_of(vector, like, 3)
    assert torch.equal(flat_blocks(found, 3), vector) and not found["a"][3:].any()


def test_replies_that_do_not_fit():
    server = FedSB(init="random").begin(network())
    reply = Reply(1, "c0", "train", 0)
    with pytest.raises(PayloadMismatch, match=r"R should be 144 values, but is \[7\]"):
        server.respond(reply, {"R": torch.zeros(7)})
    with pytest.raises(PayloadMismatch, match="should be values, but is absent"):
        server.respond(Reply(1, "c0", "factors", 0), {})
    assert server.respond(reply, {}) == "factors"


def test_a_gradient_of_zero_spans_nothing():
    server = FedSB().begin(network())
    zero = {f"{i}.whole": torch.zeros(p.shape) for i, p in enumerate(server.places)}
    acc = server.fold(None, Update(1, "c", "init", 0, zero, 5, 0, 0.0, 0.0, {}))
    with pytest.raises(adapters.AdapterError, match="zero everywhere"):
        server.commit(acc)


def test_spoilt_replies_do_not_stop_the_others():
    def short(task, reply):
        return [Reply(**{**vars(reply), "body": reply.body[:-4]})]

    federation = simulate(FedSB(init="random", compact=True))
    federation.runtime.faults = Tamper({("c1", 1): short})
    assert federation.run().incidents.count("mismatch", "c1") == 1


def test_what_is_saved_is_what_was_learned(tmp_path):
    model = network()
    federation = simulate(model=model)
    federation.run()
    with lent(model, federation.server.tensors):
        adapters.save(model, tmp_path / "a")
        expected = logits(model)
        merged = adapters.merge(_copy(model))
    loaded = adapters.load(tiny.llama(), tmp_path / "a")
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(logits(model), expected), "the simulated model is as it was"


def _copy(model):
    import copy

    return copy.deepcopy(model)


def test_killed_at_any_input(tmp_path):
    assert_killed_ends_the_same(lambda store: simulate(store=store), tmp_path, (1, 4, 7, 10, 14))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"init": "zero"}, "init is federated or public or random"),
        ({"sketch": "svd"}, "sketch is"),
        ({"init_samples": 0}, "init_samples is at least 1"),
        ({"init_lr": 0}, "init_lr is above 0"),
        ({"ranks": {"a": 0}}, "rank of a is at least 1"),
        ({"staleness": -1}, "at least 0"),
    ],
)
def test_options_are_checked(options, says):
    with pytest.raises(ConfigurationError, match=says):
        FedSB(**options)


def test_models_that_it_is_not_for():
    with pytest.raises(adapters.AdapterError, match="no lora_sb adapter"):
        FedSB().begin(tiny.llama())
    with pytest.raises(ConfigurationError, match="ranks above the adapter's 6"):
        FedSB(ranks={"a": 9}).begin(network())
    with pytest.raises(ConfigurationError, match="needs the model"):
        FedSB().server({})


def test_ranks_of_unknown_clients_are_named(caplog):
    simulate(FedSB(init="random", ranks={"c0": 2, "c9": 3}), rounds=1).run()
    said = [record.message for record in caplog.records if "ranks" in record.message]
    assert said == ["ranks are given for c9, who are not there; there are c0, c1, c2"]


def test_compact_messages_take_no_codec():
    federation = simulate(FedSB(init="random", compact=True), codec=TopK(0.5))
    with pytest.raises(ConfigurationError, match=r"sends R up \(kind train\) without a"):
        federation.run()
    simulate(FedSB(init="random"), codec=TopK(0.5), rounds=1).run()


def test_nobody_has_an_example():
    federation = simulate(places=[Site("c0", [])], patience=0)
    with pytest.raises(AggregationError):
        federation.run()
    assert same(federation.server.cores, simulate().server.cores)
