"""``anabranch federation``: served by one process, joined by another, with rows that stay there."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from anabranch.cli import app
from anabranch.errors import AnabranchError
from anabranch.federated.job import load_job
from anabranch.federated.runtimes.network import Invitation, Membership, NotAllowed
from anabranch.federated.runtimes.network.joining import Plan, fetch_plan, local_recipe, take_part
from anabranch.federated.runtimes.network.serving import Place, serve
from tests.federated.network.places import in_threads
from tests.training.tiny_base import write_base

runner = CliRunner()

RECIPE = """
recipe: tiny
base: {base}
data:
  - source: generator:instructions
    options: {{rows: 40}}
    split: {{train: 0.5, valid: 0.5}}
adapter: {{method: lora, r: 2}}
train: {{steps: 6, batch: 4, lr: 1.0e-2, schedule: constant}}
evaluate: []
"""

JOB = """
federate: silos
recipe: tiny.yaml
clients: {count: 2}
schedule: {name: sync, rounds: 2}
local: {steps: 2}
"""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    torch.set_num_threads(1)
    base = write_base(tmp_path / "base")
    (tmp_path / "tiny.yaml").write_text(RECIPE.format(base=base))
    (tmp_path / "job.yaml").write_text(JOB)
    for site in ("a", "b"):
        rows = [
            {"instruction": f"Say {site} {index}", "output": f"{site} {index * 7}"}
            for index in range(12)
        ]
        (tmp_path / f"{site}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "job.yaml"


def served(job: Path, own_data: bool = True, **options):
    """``serve`` in a thread, and the invitations of its two sites."""
    folder = job.parent / "run"
    ready: list[list] = []

    def listening(network):
        ready.append([network.invite("a"), network.invite("b")])

    def run():
        place = Place(insecure=True, absent_after=30.0, **options)
        return serve(load_job(job), folder, place, listening=listening, own_data=own_data)

    [thread] = in_threads(run)
    while not ready:
        assert thread.thread.is_alive(), thread.end()
        time.sleep(0.02)
    return thread, ready[0]


def documented() -> list[list[str]]:
    """The commands of the tour in docs/federation.md, without the program's name."""
    page = (Path(__file__).parents[3] / "docs" / "federation.md").read_text()
    tour = page.split("## Over a network")[1].split("```")[1]
    return [shlex.split(line, comments=True)[1:] for line in tour.strip().splitlines()]


@pytest.mark.slow
def test_the_tour_in_the_documentation(job: Path, tmp_path: Path, monkeypatch) -> None:
    """The coordinator and a site in processes of their own, another site in this one."""
    monkeypatch.chdir(tmp_path)
    serving, joining, *rest = documented()
    served_here = [word.replace("fl.example.org", "127.0.0.1") for word in serving]
    program = [sys.executable, "-m", "anabranch"]
    server = subprocess.Popen(
        [*program, *served_here, "--port", "0", "--json"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        first = json.loads(server.stdout.readline())
        assert first["address"].startswith("https://127.0.0.1:")
        own, other = first["invitations"]
        (tmp_path / "rows.jsonl").write_text((tmp_path / "a.jsonl").read_text())
        site = subprocess.Popen(
            [*program, *joining[:-1], own, "--name", "a", "--yes", "--json"],
            stdout=subprocess.PIPE,
            text=True,
        )
        invitation = Invitation.parse(other)
        plan = fetch_plan(invitation, tmp_path / "site-b")
        assert (
            take_part(plan, invitation, tmp_path / "site-b", "b", tmp_path / "b.jsonl")
            == "finished"
        )
        printed = json.loads(site.communicate(timeout=60)[0])
        last = json.loads(server.communicate(timeout=60)[0])
    finally:
        server.kill()
    assert (printed["reason"], printed["site"], printed["tasks"]) == ("finished", "a", 2)
    assert last["versions"] == 2 and last["incidents"] == 0
    # No file of the coordinator has a row of a site.
    for path in (tmp_path / "runs" / "silos").rglob("*"):
        assert not path.is_file() or b"Say a 3" not in path.read_bytes()
    assert rest[1][-1] == "clinic-3" == rest[2][-1]
    for command in rest[:2]:
        assert runner.invoke(app, command).exit_code == 0
    unknown = runner.invoke(app, rest[2])  # it never joined
    assert unknown.exit_code == 2 and "known: a, b" in unknown.stderr


def test_both_halves_of_a_job(job: Path, tmp_path: Path) -> None:
    server, invitations = served(job)

    def site(name, invitation):
        def run():
            folder = tmp_path / f"site-{name}"
            plan = fetch_plan(invitation, folder)
            assert plan.numbers == sum(t.numel() for t in start(plan))
            return take_part(plan, invitation, folder, name, tmp_path / f"{name}.jsonl")

        return run

    def start(plan):
        return [torch.empty(shape) for shape in plan.shared.values()]

    threads = in_threads(*(site(n, i) for n, i in zip("ab", invitations, strict=True)))
    assert [thread.end() for thread in threads] == ["finished"] * 2
    outcome = server.end()
    assert not isinstance(outcome, BaseException), outcome
    assert outcome.result.version == 2 and len(outcome.result.incidents) == 0
    assert len(outcome.result.history) == 2 and "valid/loss" in outcome.result.metrics
    weights = load_file(outcome.saved / "adapter_model.safetensors")
    assert any(bool(tensor.any()) for name, tensor in weights.items() if "lora_B" in name)
    stored = (tmp_path / "run" / "network" / "sites.sqlite").read_bytes()
    assert Membership.load(tmp_path / "site-a").key.encode() not in stored

    listing = runner.invoke(app, ["federation", "sites", str(tmp_path / "run"), "--json"])
    found = json.loads(listing.stdout)
    assert [(s["name"], s["examples"]) for s in found["sites"]] == [("a", 12), ("b", 12)]
    assert found["open_invitations"] == 0
    more = runner.invoke(app, ["federation", "invite", str(tmp_path / "run")])
    assert more.exit_code == 0 and more.stdout.startswith("anabranch-site-")
    gone = runner.invoke(app, ["federation", "revoke", str(tmp_path / "run"), "a"])
    assert gone.exit_code == 0
    table = runner.invoke(app, ["federation", "sites", str(tmp_path / "run")]).stdout
    assert re.search(r"a +12 +\S+ \S+ +\S+ \S+", table) and "1 invitations are not used" in table
    wrong = runner.invoke(app, ["federation", "revoke", str(tmp_path / "run"), "c"])
    assert wrong.exit_code == 2 and "known: a, b" in wrong.stderr
    nowhere = runner.invoke(app, ["federation", "invite", str(tmp_path)])
    assert nowhere.exit_code == 2 and "anabranch federation serve" in nowhere.stderr


def test_the_wrong_base_is_named_before_joining(job: Path, tmp_path: Path) -> None:
    server, invitations = served(job)
    other = write_base(tmp_path / "other", seed=4)
    plan = fetch_plan(invitations[0], tmp_path / "site")
    with pytest.raises(AnabranchError, match="is another model than the federation's"):
        take_part(
            plan, invitations[0], tmp_path / "site", "a", tmp_path / "a.jsonl", base=str(other)
        )
    assert Membership.load(tmp_path / "site") is None
    with pytest.raises(NotAllowed, match="for a, not for c"):
        take_part(plan, invitations[0], tmp_path / "site", "c", tmp_path / "a.jsonl")
    for name, invitation in zip("ab", invitations, strict=True):
        folder = tmp_path / f"site-{name}"
        in_threads(
            lambda n=name, i=invitation, f=folder: take_part(plan, i, f, n, tmp_path / f"{n}.jsonl")
        )
    assert server.end().result.version == 2


def test_the_plan_is_shown_and_agreed_to(job: Path, tmp_path: Path) -> None:
    server, invitations = served(job)
    arguments = ["federation", "join", str(invitations[0]), "--data", str(tmp_path / "a.jsonl")]
    shown = runner.invoke(app, [*arguments, "-o", str(tmp_path / "s")])
    assert shown.exit_code == 2 and "agree with --yes" in shown.stderr
    assert "never leaves this machine" in shown.stderr and "fedavg; 2 steps a task" in shown.stderr
    assert re.search(r"is sent +[\d.]+ k numbers a task", shown.stderr)
    assert not (tmp_path / "s").exists()
    for name, invitation in zip("ab", invitations, strict=True):
        in_threads(lambda n=name, i=invitation: runner_join(n, i, tmp_path))
    assert server.end().result.version == 2


def runner_join(name, invitation, tmp_path):
    folder = tmp_path / f"site-{name}"
    plan = fetch_plan(invitation, folder)
    return take_part(plan, invitation, folder, name, tmp_path / f"{name}.jsonl")


def test_a_coordinator_without_data_evaluates_nothing(job: Path, tmp_path: Path) -> None:
    server, invitations = served(job, own_data=False)
    for name, invitation in zip("ab", invitations, strict=True):
        in_threads(lambda n=name, i=invitation: runner_join(n, i, tmp_path))
    outcome = server.end()
    assert outcome.result.version == 2 and len(outcome.result.incidents) == 0
    assert "valid/loss" not in outcome.result.metrics and "loss" in outcome.result.metrics


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("tree=2", "all sites send to the coordinator"),
        ("recipe.template=mine.jinja", "sites do not have the file"),
        ("clients={split: category}", "--clients N"),
    ],
)
def test_jobs_that_cannot_be_served(job: Path, tmp_path: Path, override: str, says: str) -> None:
    recipe = load_job(job).resolved()["recipe"]
    (tmp_path / "whole.yaml").write_text(
        json.dumps({**yaml.safe_load(job.read_text()), "recipe": recipe})
    )
    done = runner.invoke(
        app,
        ["federation", "serve", str(tmp_path / "whole.yaml"), override, "-o", str(tmp_path / "r")],
    )
    assert done.exit_code == 2 and says in done.stderr, done.stderr
    assert not (tmp_path / "r").exists()


def test_whose_rows_are_read_how(job: Path, tmp_path: Path) -> None:
    recipe = load_job(job).recipe
    own = local_recipe(recipe, tmp_path / "a.jsonl", None, "other")
    assert own.base == "other" and own.data[0].source == "jsonl" and own.evaluate == []
    assert own.data[0].split.train == 1.0 and own.data[0].options == {}
    (tmp_path / "rows.csv.gz").touch()
    assert local_recipe(recipe, tmp_path / "rows.csv.gz", None, None).data[0].source == "csv"
    with pytest.raises(AnabranchError, match="no source of the recipe named 'x'"):
        local_recipe(recipe, tmp_path / "a.jsonl", "x", None)
    with pytest.raises(AnabranchError, match="there is no file"):
        local_recipe(recipe, tmp_path / "none.jsonl", None, None)


def test_plans_of_another_version(job: Path) -> None:
    resolved = load_job(job).resolved()
    for changed, says in (
        ({**resolved, "telepathy": True}, "telepathy: there is no such option"),
        ({**resolved, "strategy": {"name": "fedfuture"}}, "no strategies named 'fedfuture'"),
        ({**resolved, "recipe": {**resolved["recipe"], "template": "/etc/x.jinja"}}, "x.jinja"),
    ):
        with pytest.raises(AnabranchError, match="the same version of anabranch") as error:
            Plan.of({"job": changed, "base": {}, "shared": {}})
        assert says in str(error.value)


def test_no_invitation_at_all(tmp_path: Path) -> None:
    done = runner.invoke(app, ["federation", "join", "hello", "--data", "x"])
    assert done.exit_code == 2 and "copy all of the line" in done.stderr
