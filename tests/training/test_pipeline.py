"""A recipe from end to end on a tiny random model: figures, gate, deployment, interruption."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from anabranch import models
from anabranch.errors import ConfigurationError, MissingExtra
from anabranch.training.data import DataReport
from anabranch.training.errors import DataError, TrainingError
from anabranch.training.options import parse_options
from anabranch.training.pipeline import Outcome, Pipeline
from anabranch.training.preview import marked, preview
from anabranch.training.recipe import Recipe
from anabranch.training.report import Document, Section
from anabranch.training.trainer import Trainer
from tests.training.tiny_base import write_base


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ANABRANCH_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(autouse=True)
def pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only one test draws the loss curve; the others run as if matplotlib were not there."""

    def missing(*_: Any) -> None:
        raise MissingExtra("matplotlib", "train")

    if request.function is not test_a_recipe_from_data_to_deployment:
        monkeypatch.setattr("anabranch.training.report.plot_losses", missing)


@pytest.fixture(scope="module")
def finished_once(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("anabranch.training.report._curve", lambda *_: None)
        assert Pipeline(recipe(base), output).run().status == "finished"
    return output


@pytest.fixture
def finished(finished_once: Path, tmp_path: Path) -> Path:
    """The folder of a finished run of ``recipe(base)``, this test's own copy."""
    return Path(shutil.copytree(finished_once, tmp_path / "finished"))


def recipe(base: Path, **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "recipe": "tiny",
        "base": str(base),
        "data": [
            {
                "name": "chores",
                "source": "generator:instructions",
                "options": {"rows": 80},
                "split": {"train": 0.8, "valid": 0.1, "test": 0.1},
            }
        ],
        "adapter": {"method": "lora", "r": 4, "target_modules": "all-linear"},
        "train": {"steps": 12, "batch": 8, "lr": 3e-2, "checkpoint": {"every": 2}},
        "evaluate": [{"rows": 8, "generate": {"rows": 3, "max_tokens": 8}}],
    }
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(values.get(key), dict) else value
    return parse_options(Recipe, values)


def record(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return content


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "adapter" / "adapter_model.safetensors"))


def same(a: Path, b: Path) -> bool:
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_a_recipe_from_data_to_deployment(base: Path, tmp_path: Path, own_cache: Path) -> None:
    output = tmp_path / "run"
    outcome = Pipeline(recipe(base, deploy={"register_as": "chores"}), output).run()
    assert outcome.status == "finished"
    nll = outcome.figures["heldout"]["nll"]
    assert nll["tuned"]["value"] < nll["base"]["value"]
    assert nll["difference"]["high"] < 0
    assert {"token_f1", "exact"} < set(outcome.figures["heldout"])
    run = record(output)
    assert run["recipe"]["train"]["lr"] == 3e-2
    assert run["versions"]["torch"] == torch.__version__
    assert len(run["data"]["chores"]) == 64
    assert set(run["stages"]) >= {"data", "initialise", "set up", "train", "deploy"}
    data = json.loads((output / "data.json").read_text())["sources"][0]
    assert data["read"] == sum(data["splits"].values()) + sum(data["removed"].values())

    report = (output / "report.md").read_text()
    assert "| nll (lower is better) | 8 |" in report
    assert "recipe: tiny" in report
    page = (output / "report.html").read_text()
    assert "<svg" in page
    assert "http" not in page.split("<svg")[0]

    published = own_cache / "adapters" / "chores"
    assert outcome.published == published
    monitor = json.loads((published / "monitor.json").read_text())
    assert len(monitor["prompt_token_edges"]) == 9
    plain = AutoModelForCausalLM.from_pretrained(base)
    PeftModel.from_pretrained(plain, str(published))  # plain PEFT reads it


def test_a_finished_run_says_so_and_does_nothing(
    base: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "load", lambda *a, **k: pytest.fail("loaded a model"))
    outcome = Pipeline(recipe(base), finished).run()
    assert (outcome.status, outcome.folder) == ("finished", finished)
    assert outcome.figures == record(finished)["figures"]


def test_a_changed_recipe_is_refused_with_the_difference(base: Path, finished: Path) -> None:
    output = finished
    before = weights(output)
    changed = recipe(base, train={"lr": 1e-3, "steps": 3})
    with pytest.raises(ConfigurationError, match=r"train\.lr: 0\.03 -> 0\.001"):
        Pipeline(changed, output).run()
    assert weights(output).keys() == before.keys()
    assert Pipeline(changed, output).run(force=True).status == "finished"
    assert record(output)["result"]["steps"] == 3
    assert weights(output / "previous-1").keys() == before.keys()  # nothing is overwritten
    assert record(output / "previous-1")["result"]["steps"] == 12


def test_deployment_can_be_added_without_training_again(
    base: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = finished
    before = weights(output)
    monkeypatch.setattr(Trainer, "step", lambda *a: pytest.fail("trained again"))
    outcome = Pipeline(recipe(base, deploy={"register_as": "later"}), output).run()
    assert outcome.published is not None
    deployed = load_file(outcome.published / "adapter_model.safetensors")
    assert all(torch.equal(deployed[key], before[key]) for key in before)


def test_the_gate_refuses_a_regression(
    base: Path, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = Trainer.fit

    def spoiled(trainer: Trainer[Any]) -> Any:
        result = fit(trainer)
        with torch.no_grad():
            for parameter in trainer.trainable.values():
                parameter.normal_(std=10.0)
        return result

    monkeypatch.setattr(Trainer, "fit", spoiled)
    harmful = recipe(base, train={"steps": 2}, deploy={"register_as": "worse"})
    outcome = Pipeline(harmful, tmp_path / "run").run()
    assert outcome.status == "refused"
    assert "not deployed: nll of heldout went from" in outcome.message
    assert not (own_cache / "adapters" / "worse").exists()
    assert "Gate not passed" in (tmp_path / "run" / "report.md").read_text()
    assert Pipeline(harmful, tmp_path / "run").run().status == "refused"
    waved = recipe(base, train={"steps": 2}, deploy={"register_as": "worse", "gate": None})
    assert Pipeline(waved, tmp_path / "run").run().status == "finished"
    assert (own_cache / "adapters" / "worse").exists()


def test_a_gate_on_an_unknown_figure_lists_those_there_are(base: Path, finished: Path) -> None:
    wrong = recipe(base, deploy={"register_as": "x", "gate": {"metric": "acuracy"}})
    with pytest.raises(
        ConfigurationError, match="no figure 'acuracy'; it has nll, token_f1, exact"
    ):
        Pipeline(wrong, finished).run()


def test_a_taken_name_is_refused_before_training(base: Path, tmp_path: Path) -> None:
    deployed = recipe(base, deploy={"register_as": "mine"}, train={"steps": 2})
    Pipeline(deployed, tmp_path / "a").run()
    with pytest.raises(ConfigurationError, match="'mine' is taken by"):
        Pipeline(deployed, tmp_path / "b").run()
    assert not (tmp_path / "b" / "training").exists()


def test_an_interrupted_run_continues_to_the_same_weights(
    base: Path, finished: Path, tmp_path: Path
) -> None:
    pipeline = Pipeline(recipe(base), tmp_path / "parts")
    pipeline._progress = lambda message, fraction: (
        pipeline.stop() if message.startswith("step 5/") else None
    )
    stopped = pipeline.run()
    assert stopped.status == "interrupted"
    assert "stopped after step 5" in stopped.message
    resumed = Pipeline(recipe(base), tmp_path / "parts").run()
    assert record(tmp_path / "parts")["result"]["resumed_from"] == 5
    assert same(finished, tmp_path / "parts")
    assert resumed.figures == record(finished)["figures"]


KILLED = """
import sys
from pathlib import Path
from anabranch.training.pipeline import Pipeline
from anabranch.training.recipe_file import load_recipe
Pipeline(load_recipe(sys.argv[1]), Path(sys.argv[2])).run()
"""


@pytest.mark.slow
def test_kill_9_loses_nothing(base: Path, tmp_path: Path) -> None:
    from anabranch.training.recipe_file import dump_yaml

    slow = recipe(base, train={"steps": 40})
    file = tmp_path / "slow.yaml"
    file.write_text(dump_yaml(slow.resolved()))
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(file), str(tmp_path / "killed")])
    log = tmp_path / "killed" / "training" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= 7) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert record(tmp_path / "killed")["status"] == "running"
    outcome = Pipeline(slow, tmp_path / "killed").run()
    assert outcome.status == "finished"
    assert record(tmp_path / "killed")["result"]["resumed_from"] >= 2
    Pipeline(slow, tmp_path / "whole").run()
    assert same(tmp_path / "whole", tmp_path / "killed")


def test_data_that_changed_since_are_refused(base: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": f"{w}?", "answer": w}) for w in "abcdefghijklmnopqrstuvwxyz"]
    rows.write_text("\n".join(lines))
    mine = recipe(
        base,
        data=[{"source": "jsonl", "path": str(rows), "split": {"train": 0.7, "test": 0.3}}],
    )
    pipeline = Pipeline(mine, tmp_path / "run")
    pipeline._progress = lambda message, fraction: (
        pipeline.stop() if message.startswith("step 2/") else None
    )
    assert pipeline.run().status == "interrupted"
    rows.write_text("\n".join(lines[:-1]))
    with pytest.raises(TrainingError, match="data has changed since"):
        Pipeline(mine, tmp_path / "run").run()


def test_merged_models_load_by_name_and_answer_like_the_adapter(base: Path, finished: Path) -> None:
    merged = recipe(base, deploy={"register_as": "merged-chores", "merge": True})
    outcome = Pipeline(merged, finished).run()
    loaded = models.load("merged-chores", dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(base)
    adapted = PeftModel.from_pretrained(plain, str(finished / "adapter")).eval()
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.allclose(
            loaded.network(tokens).logits, adapted(tokens).logits, atol=1e-4, rtol=1e-4
        )
    assert loaded.card.provenance == "tiny, fine-tuned by recipe tiny"
    assert outcome.published == loaded.path


@pytest.mark.parametrize("method", ["full", "hft"])
def test_all_weights_can_be_trained(base: Path, tmp_path: Path, method: str) -> None:
    whole = recipe(base, train={"lr": 1e-3}, deploy={"register_as": f"all-{method}"})
    whole = whole.model_copy(
        update={"adapter": whole.adapter.__class__.model_validate({"method": method})}
    )
    outcome = Pipeline(whole, tmp_path / "run").run()
    assert outcome.status == "finished"
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert models.card(f"all-{method}").parameters == models.card(str(base)).parameters


def test_preference_pairs(base: Path, tmp_path: Path) -> None:
    pairs = recipe(
        base,
        data=[
            {
                "source": "generator:preferences",
                "options": {"rows": 60},
                "task": "preference",
                "split": {"train": 0.8, "test": 0.2},
            }
        ],
        evaluate=[{"rows": 8}],
    )
    values = pairs.resolved() | {"loss": {"name": "dpo", "beta": 0.5}}
    outcome = Pipeline(parse_options(Recipe, values), tmp_path / "run").run()
    figure = outcome.figures["heldout"]["reward_accuracy"]
    assert figure["base"]["value"] == 0.5
    assert figure["tuned"]["value"] == 1.0
    assert figure["mean_margin"] > 0


def test_running_text(base: Path, tmp_path: Path) -> None:
    text = recipe(
        base,
        data=[
            {
                "source": "generator:sentences",
                "options": {"rows": 40},
                "task": "text",
                "split": {"train": 0.8, "test": 0.2},
            }
        ],
        template="raw",
        train={"max_length": 64, "overlong": "split"},
        evaluate=[{"rows": 6}],
    )
    nll = Pipeline(text, tmp_path / "run").run().figures["heldout"]["nll"]
    assert nll["tuned"]["value"] < nll["base"]["value"]
    assert nll["rows"] > 6  # split into pieces


def test_one_process_in_a_folder(base: Path, tmp_path: Path) -> None:
    outer = Pipeline(recipe(base, train={"steps": 1}), tmp_path / "run")
    seen: list[str] = []

    def intrude(message: str, fraction: float | None) -> None:
        if not seen:
            with pytest.raises(ConfigurationError, match="another process is running") as raised:
                Pipeline(recipe(base), tmp_path / "run").run()
            seen.append(str(raised.value))

    outer._progress = intrude
    assert outer.run().status == "finished"
    assert seen


def test_folders_that_hold_something_else_are_left_alone(base: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match="holds no run"):
        Pipeline(recipe(base), tmp_path / "run").run()
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["thesis.txt"]


def test_an_evaluation_without_rows_is_refused(base: Path, tmp_path: Path) -> None:
    nothing = recipe(
        base, data=[{"source": "generator:instructions", "split": "train", "options": {"rows": 20}}]
    )
    with pytest.raises(DataError, match="no source has a share of 'test'"):
        Pipeline(nothing, tmp_path / "run").run()


def test_preview_measures_and_writes_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = preview(recipe(base))
    assert list(tmp_path.iterdir()) == []
    assert found.steps == 12
    assert found.tokens_per_second > 0
    assert found.train_seconds > 0
    assert found.peak_bytes > 1e6
    assert 0 < found.trainable < found.parameters
    text = marked(found.rows[0][0])
    assert text.startswith("<|im_start|>user\n")
    assert "<|im_start|>assistant\n[[Result: " in text
    assert text.endswith("Done.<|im_end|>]]\n")
    json.dumps(found.to_dict())


def test_reports_escape_what_models_write() -> None:
    hostile = "```\n<script>alert(1)</script> | x"
    document = Document("t", hostile, [Section("s", table=[["a|b"], [hostile]], verbatim=hostile)])
    assert "<script>" not in document.page()
    assert "````\n```\n<script>" in document.markdown()
    assert "a\\|b" in document.markdown()
    assert DataReport().to_dict()["sources"] == []
    assert Outcome("finished", "m", Path()).figures == {}
