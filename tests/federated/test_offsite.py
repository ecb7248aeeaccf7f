"""Emulators, what is plugged in, frozen parts that are sent once, and the four modes."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

from anabranch import adapters
from anabranch.cli import app
from anabranch.errors import ConfigurationError
from anabranch.evaluation.testbeds import tinyops
from anabranch.federated import Federation, Simulation, Site, Sync
from anabranch.federated.compare import MODES, compare
from anabranch.federated.emulator import (
    SplitPlan,
    SplitPlanError,
    align,
    decoder_layers,
    make_emulator,
    plug_in,
)
from anabranch.federated.errors import AggregationError, FederationError
from anabranch.federated.job import load_job
from anabranch.federated.shared import lent, shared_tensors
from anabranch.federated.strategies import FedAvg
from anabranch.federated.strategies.fedit import FedIT
from anabranch.federated.strategies.offsite import Offsite
from tests.adapters.models import MODELS
from tests.federated.adapted import local, logits, lora, same, sites
from tests.federated.helpers import assert_killed_ends_the_same
from tests.training.tiny_base import write_base


def deep(seed=0, layers=6):
    return tinyops.network(seed, layers=layers, width=16).eval()


def places(count=2):
    return [Site(f"c{i}", tinyops.items(4 + i, 12, "offsite", i)) for i in range(count)]


def simulate(model, strategy=None, rounds=2, **options):
    return (strategy or Offsite()).simulate(model, local(), places(), rounds=rounds, **options)


@given(
    st.integers(3, 40), st.integers(-3, 45), st.integers(-3, 45), st.floats(0, 1, exclude_max=True)
)
def test_plans_keep_ends_and_order(layers, left, right, drop):
    first, last = max(1, left), min(layers - 1, right)
    if first >= last:
        with pytest.raises(SplitPlanError, match="which is none"):
            SplitPlan.of(layers, left, right, drop)
        return
    plan = SplitPlan.of(layers, left, right, drop)
    assert list(plan.order) == sorted(set(plan.order))
    assert len(plan.kept) == max(1, round((last - first) * (1 - drop)))
    assert all(first <= index < last for index in plan.kept)
    assert plan.order[0] == 0 and plan.order[-1] == layers - 1
    assert [plan.order[position] for position in plan.emulated] == list(plan.kept)


def test_the_papers_example_of_eight_layers():
    assert SplitPlan.of(8, 2, 6, 0.5).order == (0, 1, 2, 5, 6, 7)
    assert SplitPlan.of(8, 2, 6, 0.75).kept == (4,)
    with pytest.raises(SplitPlanError, match="drop is a share"):
        SplitPlan.of(8, 2, 6, 1.0)


def test_nothing_dropped_is_the_full_model():
    full = deep()
    emulator, plan = make_emulator(full, 2, 4, drop=0.0)
    ids = torch.arange(12).reshape(2, 6)
    assert torch.equal(emulator(input_ids=ids).logits, full(input_ids=ids).logits)
    simulate(emulator).run()
    with torch.no_grad():
        for parameter in emulator.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    plugged = plug_in(full, shared_tensors(emulator), plan)
    with lent(full, plugged):
        assert torch.equal(full(input_ids=ids).logits, emulator(input_ids=ids).logits)


@pytest.mark.parametrize(("family", "count"), [("qwen2", "num_hidden_layers"), ("gpt2", "n_layer")])
def test_other_architectures_are_shortened(family, count):
    config = MODELS[family]().config
    setattr(config, count, 5)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1] * 5
    full = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    emulator, plan = make_emulator(full, 1, 4, drop=0.7)
    assert len(decoder_layers(emulator)[1]) == 3 and len(decoder_layers(full)[1]) == 5
    ids = torch.arange(12).reshape(2, 6)
    layers = decoder_layers(full)[1]
    kept = torch.nn.ModuleList([layers[index] for index in plan.order])
    expected = emulator(input_ids=ids).logits
    parent = full.get_submodule(decoder_layers(full)[0].rpartition(".")[0])
    setattr(parent, decoder_layers(full)[0].rpartition(".")[2], kept)
    full.config.num_hidden_layers = 3
    assert torch.equal(full(input_ids=ids, use_cache=False).logits, expected)


def test_models_without_layers():
    with pytest.raises(SplitPlanError, match="no list of None layers"):
        decoder_layers(torch.nn.Linear(2, 2))


def test_tensors_go_back_by_layer_number():
    full = deep()
    emulator, plan = make_emulator(full, 1, 5, drop=0.75)
    assert plan.order == (0, 3, 5)
    names = {name.split(".")[2] for name in shared_tensors(emulator)}
    assert names == {"0", "2"}, "the middle is frozen"
    plugged = plug_in(full, shared_tensors(emulator), plan)
    assert {name.split(".")[2] for name in plugged} == {"0", "5"}
    parameters = dict(full.named_parameters())
    assert all(torch.equal(tensor, parameters[name]) for name, tensor in plugged.items())
    tensor = next(iter(shared_tensors(emulator).values()))
    for name, says in (
        ("model.layers.1.mlp.up_proj.weight", "emulated middle"),
        ("model.norm.weight", "of no layer"),
        ("model.layers.2.mlp.nothing.weight", "is absent"),
    ):
        with pytest.raises(FederationError, match=says):
            plug_in(full, {name: tensor}, plan)
    with pytest.raises(FederationError, match=r"is \[3\], and"):
        plug_in(full, {"model.layers.2.mlp.up_proj.weight": torch.zeros(3)}, plan)


def test_alignment_moves_only_the_middle_and_towards_the_full_model():
    full = deep()
    emulator, plan = make_emulator(full, 1, 5, drop=0.5)
    before = {name: p.detach().clone() for name, p in emulator.named_parameters()}
    data = tinyops.items(0, 64, "align")
    options = tinyops.training_options(lr=1e-3, batch=16, steps=1)
    first = align(full, emulator, plan, data, tinyops.objective(), options)
    options = tinyops.training_options(lr=3e-3, batch=16, steps=40)
    last = align(full, emulator, plan, data, tinyops.objective(), options)
    assert last < 0.8 * first
    moved = {
        n.split(".")[2] for n, p in emulator.named_parameters() if not torch.equal(p, before[n])
    }
    assert moved == {str(position) for position in plan.emulated}
    trainable = {name.split(".")[2] for name in shared_tensors(emulator)}
    assert trainable == {"0", str(len(plan.order) - 1)}, "as before"


def test_with_the_frozen_part_at_hand_it_is_fedavg():
    ours, plain = (
        simulate(make_emulator(deep(), 2, 4)[0]),
        simulate(make_emulator(deep(), 2, 4)[0], FedAvg()),
    )
    ours.run(), plain.run()
    assert same(ours.server.tensors, plain.server.tensors)


def elsewhere(store=None, **options):
    """Sites whose model has the form of the emulator, and other values."""
    emulator, _ = make_emulator(deep(), 2, 4)
    blank, _ = make_emulator(deep(seed=9), 2, 4)
    strategy = Offsite(**options)
    runtime = Simulation(places(), blank)
    return Federation(
        strategy.begin(emulator), strategy.client(local()), Sync(3), runtime, store=store
    )


@pytest.mark.parametrize("upload", ["delta", "weights"])
def test_the_frozen_part_is_sent_once(upload):
    federation = elsewhere(upload=upload)
    result = federation.run()
    kinds = {key: t.messages for key, t in result.ledger.by("direction", "kind").items()}
    assert kinds == {
        ("down", "train"): 6,
        ("up", "train"): 6,
        ("down", "frozen"): 2,
        ("up", "frozen"): 2,
    }
    here = simulate(make_emulator(deep(), 2, 4)[0], Offsite(upload=upload), rounds=3)
    frozen = sum(
        p.nbytes for p in make_emulator(deep(), 2, 4)[0].parameters() if not p.requires_grad
    )
    assert result.ledger.by("direction", "kind")["down", "frozen"].payload > 2 * frozen
    here.run()
    assert not len(result.incidents)
    # The tasks have other numbers, so only what is trained is the same, not on what.
    assert here.server.tensors.keys() == federation.server.tensors.keys()


def test_killed_at_any_input(tmp_path):
    assert_killed_ends_the_same(elsewhere, tmp_path, (1, 2, 4, 6))


def test_a_model_of_another_form():
    strategy = Offsite()
    runtime = Simulation(places(1), make_emulator(deep(layers=4), 1, 3)[0])
    federation = Federation(
        strategy.begin(make_emulator(deep(), 2, 4, drop=0.0)[0]),
        strategy.client(local()),
        Sync(1),
        runtime,
        patience=0,
    )
    with pytest.raises(AggregationError, match="c0 has a model of another form"):
        federation.run()


# The five modes


def test_modes_are_what_they_say():
    model, data = lora(), sites(3, 8)
    training = local()
    seen = []

    def score():
        seen.append(logits(model))
        return {"loss": float(seen[-1].square().mean())}

    found = compare(FedIT(), model, training, data, Sync(2), score, rounds=2, seed=1)
    assert tuple(found) == MODES and len(seen) == 1 + 3 + 1 + 1 + 3
    assert torch.equal(seen[5], logits(model)), "zero-shot is the model as it came"
    federation = FedIT().simulate(model, training, data, rounds=2, seed=1)
    result = federation.run()
    with lent(model, federation.server.tensors):
        assert torch.equal(logits(model), seen[0])
    assert found["federated"].bytes == result.ledger.total().payload
    assert found["federated"].trained == sum(t.numel() for t in shared_tensors(model).values())
    alone = FedAvg(upload="weights").simulate(model, training, data[1:2], rounds=2, seed=1)
    alone.run()
    with lent(model, alone.server.tensors):
        assert torch.equal(logits(model), seen[2])
    assert set(found["local"].clients) == {"c0", "c1", "c2"}
    low, high = found["local"].spread["loss"]
    assert low <= found["local"].figures["loss"] <= high
    with pytest.raises(ConfigurationError, match="no mode 'alone'"):
        compare(FedIT(), model, training, data, Sync(1), score, rounds=1, modes=["alone"])


RECIPE = """
recipe: tiny
base: {base}
data:
  - source: generator:instructions
    options: {{rows: 60}}
    split: {{train: 0.8, valid: 0.2}}
adapter: {{method: {adapter}, r: 4, target_modules: [q_proj, v_proj]}}
train: {{steps: 6, batch: 8, lr: 1.0e-2, schedule: constant}}
evaluate: []
"""

JOB = """
federate: silos
recipe: tiny.yaml
clients: {{count: 3, split: {{name: iid}}}}
strategy: {strategy}
schedule: {{name: sync, rounds: 2, decay: cosine}}
local: {{steps: 2}}
"""


def write(folder, strategy="fedit", adapter="lora"):
    torch.set_num_threads(1)
    base = write_base(folder / "base")
    (folder / "tiny.yaml").write_text(RECIPE.format(base=base, adapter=adapter))
    (folder / "job.yaml").write_text(JOB.format(strategy=strategy))
    return str(folder / "job.yaml")


def test_one_command_makes_the_table(tmp_path):
    job, output = write(tmp_path), tmp_path / "modes"
    command = ["federation", "compare", job, "-o", str(output), "--json"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    assert list(printed) == list(MODES)
    assert printed["federated"]["figures"]["loss"] < printed["zero-shot"]["figures"]["loss"]
    # Cut off after two modes, it makes the others.
    stored = json.loads((output / "modes.json").read_text())
    (output / "modes.json").write_text(json.dumps({m: stored[m] for m in ("federated", "local")}))
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 0 and json.loads(again.stdout) == printed
    shown = CliRunner().invoke(app, command[:-1])
    assert "zero-shot" in shown.stdout and " to " in shown.stdout
    refused = CliRunner().invoke(app, [*command, "local={epochs: 1}"])
    assert refused.exit_code == 2


def test_jobs_of_these_methods(tmp_path):
    """Fed-SB from a file: private, with every version kept."""
    job, output = write(tmp_path, "fed-sb", "lora_sb"), tmp_path / "run"
    options = ["privacy={epsilon: 50, delta: 1.0e-3, clip: 0.5}", "keep_versions=true"]
    done = CliRunner().invoke(app, ["federate", job, *options, "-o", str(output), "--json"])
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    assert 0 < printed["metrics"]["epsilon/client-0"] <= 50
    assert sorted(path.name for path in (output / "versions").iterdir()) == ["0001", "0002"]
    for override, says in (
        ("strategy=fedkseed", "cannot keep privacy"),
        ("privacy={epsilon: 1, delta: 2, clip: 1}", "less than 1"),
    ):
        refused = CliRunner().invoke(app, ["federate", job, *options, override])
        assert refused.exit_code == 2 and says in refused.stderr, refused.stderr
    (tmp_path / "other").mkdir()
    with pytest.raises(ConfigurationError, match=r"fed-sb is for the adapter lora_sb; .* has lora"):
        load_job(write(tmp_path / "other", "fed-sb", "lora"))


def test_bytes_of_smollm2():
    """Values in a compact message for SmolLM2-135M's shapes: r = 64 sends 35 % of LoRA's r = 8."""

    def values(method, r):
        config = LlamaConfig(
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            vocab_size=49152,
            tie_word_embeddings=True,
        )
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(config)
            model = adapters.build(method, network, r=r, target_modules="all-linear")
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    assert values("lora_sb", 64) == 30 * 7 * 64**2
    assert 4 * values("lora", 8) == 9_768_960
    assert values("lora_sb", 64) <= 0.4 * values("lora", 8)
