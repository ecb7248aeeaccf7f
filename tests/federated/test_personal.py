"""pFedMe against closed forms, and what a comparison says of personal models."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from anabranch import registry
from anabranch.errors import ConfigurationError
from anabranch.federated import Simulation, Site, Sync
from anabranch.federated.compare import MODES, compare
from anabranch.federated.personal import PERSONAL, hold_out, personal_tensors
from anabranch.federated.shared import lent
from anabranch.federated.strategies import FedAvg, FedAvgServer, FedIT, PFedMe
from tests.federated.adapted import items, local, logits, lora, same, sites
from tests.federated.helpers import assert_killed_ends_the_same, fingerprint
from tests.federated.quadratics import Point, bowls, places, position
from tests.federated.quadratics import local as plain_sgd

SIZE, LAM = 5, 2.0


def run(strategy, made, rounds=3, training=None, **options):
    model = Point(SIZE)
    federation = strategy.simulate(
        model, training or plain_sgd(), places(made), rounds=rounds, **options
    )
    federation.run()
    return federation


def proximal_point(bowl, w, lam):
    """argmin of ``(v - t) H (v - t) / 2 + lam / 2 |v - w|^2``: (H + lam I) v = H t + lam w."""
    return np.linalg.solve(bowl.hessian + lam * np.eye(SIZE), bowl.hessian @ bowl.target + lam * w)


@pytest.mark.parametrize("step", [0.25, 1.0])
@pytest.mark.parametrize("solves", [1, 3])
def test_solved_exactly_it_is_gradient_descent_on_the_moreau_envelopes(step, solves):
    """w <- w - step (w - prox(w)), averaged; step / lam is the rate on the envelope's gradient."""
    made = bowls(3)
    training = plain_sgd(lr=0.3, steps=60)
    federation = run(PFedMe(LAM, step, solves), made, rounds=2, training=training)
    w = np.zeros(SIZE)
    for _ in range(2):
        ends = []
        for bowl in made:
            own = w.copy()
            for _ in range(solves):
                own = own - step * (own - proximal_point(bowl, own, LAM))
            ends.append(own)
        before, w = w, np.mean(ends, axis=0)
    np.testing.assert_allclose(position(federation.server.tensors), w, atol=2e-5)
    for index, bowl in enumerate(made):
        kept = personal_tensors(federation.runtime.node(f"c{index}").state)
        anchor = before
        for _ in range(solves - 1):
            anchor = anchor - step * (anchor - proximal_point(bowl, anchor, LAM))
        np.testing.assert_allclose(position(kept), proximal_point(bowl, anchor, LAM), atol=2e-5)


def test_it_converges_to_the_minimum_of_the_mean_envelope():
    made = bowls(4)
    federation = run(PFedMe(LAM, 1.0), made, 100, plain_sgd(lr=0.3, steps=10))
    # The gradient lam (w - prox_i(w)) is linear in w: solve for its mean being zero.
    inverse = [np.linalg.inv(b.hessian + LAM * np.eye(SIZE)) for b in made]
    left = np.mean([np.eye(SIZE) - LAM * i for i in inverse], axis=0)
    right = np.mean([i @ b.hessian @ b.target for i, b in zip(inverse, made, strict=True)], axis=0)
    expected = np.linalg.solve(left, right)
    np.testing.assert_allclose(position(federation.server.tensors), expected, atol=1e-3)


def test_personal_models_fit_their_own_data_better_and_are_held_by_lam():
    made = bowls(3)

    def far(lam):
        federation = run(PFedMe(lam), made, 5, plain_sgd(lr=0.05, steps=20))
        shared = position(federation.server.tensors)
        owns = [
            position(personal_tensors(federation.runtime.node(f"c{i}").state)) for i in range(3)
        ]
        gains = [
            (shared - b.target) @ b.hessian @ (shared - b.target)
            - (own - b.target) @ b.hessian @ (own - b.target)
            for own, b in zip(owns, made, strict=True)
        ]
        assert min(gains) > 0
        return np.mean([np.linalg.norm(own - shared) for own in owns])

    assert far(0.1) > far(1.0) > far(8.0)


def test_without_a_leash_and_memory_it_is_fedavg_bit_for_bit():
    made = bowls(3)
    for upload in ("delta", "weights"):
        one = run(PFedMe(0.0, 1.0, 1, warm=False, upload=upload), made)
        assert same(one.server.tensors, run(FedAvg(upload=upload), made).server.tensors)


def test_a_language_model_keeps_its_adapter_at_home_and_resumes(tmp_path):
    def make(store):
        torch.manual_seed(0)
        return PFedMe(0.5, 0.5, 2).simulate(lora(), local(), sites(2), rounds=3, store=store)

    assert_killed_ends_the_same(make, tmp_path, (2, 4, 6))
    whole = make(tmp_path / "again")
    result = whole.run()
    plain = FedAvg().simulate(lora(), local(), sites(2), rounds=3)
    assert result.ledger.total().payload == plain.run().ledger.total().payload
    states = [whole.runtime.node(f"c{i}").state for i in range(2)]
    assert all(set(state) == {PERSONAL} for state in states)
    assert not same(*map(personal_tensors, states))
    assert fingerprint(whole)["version"] == 3


def test_a_client_without_data_keeps_nothing():
    federation = PFedMe().simulate(
        Point(SIZE), plain_sgd(), [*places(bowls(2)), Site("empty", [])], rounds=2
    )
    federation.run()
    assert not personal_tensors(federation.runtime.node("empty").state)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lam": -1.0}, "lam is at least 0"),
        ({"lam": float("nan")}, "lam is at least 0"),
        ({"step": 0.0}, "step is above 0"),
        ({"step": 1.5}, "step is above 0"),
        ({"solves": 0}, "solves is a number"),
        ({"upload": "all"}, "upload is delta or weights"),
    ],
)
def test_options_that_cannot_work(options, says):
    with pytest.raises(ConfigurationError, match=says):
        PFedMe(**options)
    assert registry.get("strategies", "pfedme") is PFedMe


# Mode personal of a comparison


def compared(strategy, modes=MODES, **options):
    model, data = lora(), sites(3, 8)
    own = {f"c{i}": items(4, 100 + i, f"task {i}") for i in range(3)}
    seen = []

    def score():
        seen.append(logits(model))
        return {"loss": float(seen[-1].square().mean())}

    def scorer(name):
        return lambda: {"loss/own": float(logits(model).abs().sum()) + len(own[name])}

    found = compare(
        strategy, model, options.pop("local", local()), data, Sync(2), score, rounds=2, seed=1,
        modes=modes, own={name: scorer(name) for name in own}, **options,
    )  # fmt: skip
    return model, data, found, seen


def test_each_client_tunes_the_federations_model_for_one_task():
    model, data, found, seen = compared(FedIT(), ("federated", "personal"))
    federation = FedIT().simulate(model, local(), data, rounds=2, seed=1)
    federation.run()
    start = federation.server.tensors
    for index, site in enumerate(data):
        plain = FedAvg(upload="weights")
        with lent(model, start):
            tuned = plain.simulate(model, local(), [site], rounds=1, seed=1)
            tuned.run()
        with lent(model, tuned.server.tensors):
            assert torch.equal(logits(model), seen[1 + index])
    result = found["personal"]
    assert set(result.clients) == {"c0", "c1", "c2"} and result.bytes == found["federated"].bytes
    assert result.figures["loss"] == pytest.approx(
        np.mean([figures["loss"] for figures in result.clients.values()])
    )
    low, high = result.spread["loss/own"]
    assert low <= result.figures["loss/own"] <= high
    assert set(found["federated"].clients["c0"]) == {"loss/own"}


def test_tuning_may_take_other_steps():
    *_, usual = compared(FedIT(), ("personal",))
    *_, longer = compared(FedIT(), ("personal",), tuning=local(steps=5))
    assert not torch.equal(usual[0], longer[0])


def test_personal_models_of_the_method_are_taken_as_they_are():
    model, data, _, seen = compared(PFedMe(), ("personal",))
    federation = PFedMe().simulate(model, local(), data, rounds=2, seed=1)
    federation.run()
    for index in range(3):
        with lent(model, personal_tensors(federation.runtime.node(f"c{index}").state)):
            assert torch.equal(logits(model), seen[index])


def test_the_federation_is_run_once_and_goes_on_where_it_was(tmp_path, monkeypatch):
    *_, found, seen = compared(PFedMe(), ("federated", "personal"), store=tmp_path / "run")
    tasks = []
    work = Simulation._work
    monkeypatch.setattr(
        Simulation, "_work", lambda self, task: (tasks.append(task), work(self, task))
    )
    *_, again, later = compared(PFedMe(), ("personal",), store=tmp_path / "run")
    assert not tasks, "a finished federation is not run again"
    assert again["personal"] == found["personal"]
    assert all(torch.equal(a, b) for a, b in zip(seen[1:], later, strict=True))


def test_a_comparison_that_is_cut_off_goes_on_within_the_federation(tmp_path, monkeypatch):
    *_, whole, _ = compared(FedIT(), ("federated",))
    commit, calls = FedAvgServer.commit, []

    def stop(self, acc):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return commit(self, acc)

    monkeypatch.setattr(FedAvgServer, "commit", stop)
    with pytest.raises(KeyboardInterrupt):
        compared(FedIT(), ("federated",), store=tmp_path / "run")
    *_, parts, _ = compared(FedIT(), ("federated",), store=tmp_path / "run")
    assert len(calls) == 3 and parts == whole


# Held-out examples of each client


def test_what_is_held_out_is_a_part_of_each_client():
    parts = {"a": np.arange(20), "b": np.arange(20, 22), "c": np.array([22]), "d": np.array([])}
    own = hold_out(parts, 0.25, 3)
    assert [len(own[name]) for name in parts] == [5, 1, 0, 0]
    assert all(set(own[name]) <= set(parts[name]) for name in parts)
    assert all(np.array_equal(own[n], hold_out(parts, 0.25, 3)[n]) for n in parts)
    assert not np.array_equal(own["a"], hold_out(parts, 0.25, 4)["a"])
    assert not any(len(part) for part in hold_out(parts, 0.0, 3).values())
    assert len(hold_out(parts, 0.99, 3)["a"]) == 19
