"""``anabranch federation plan``: the plan of a job against its run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from anabranch.cli import app
from anabranch.errors import ConfigurationError
from anabranch.federated import Deadline, DeviceProfile, Sync, Uniform
from anabranch.federated.job import load_job
from anabranch.federated.plans import Expected, plan_job, plan_schedules
from anabranch.federated.running import federate
from anabranch.federated.scheduling import Schedule
from tests.federated.test_job import JOB
from tests.federated.tiny_recipe import write_recipe

runner = CliRunner()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("plan")
    write_recipe(folder)
    path = folder / "job.yaml"
    path.write_text(JOB)
    return path


CODEC = "codec=[{name: top_k, keep: 0.1}, {name: quantise, bits: 8}]"


def test_seconds_and_bytes_are_those_of_the_run(file: Path, tmp_path: Path) -> None:
    job = load_job(file, [CODEC])
    plan = plan_job(job)
    result = federate(job, tmp_path / "run").result
    assert plan.schedules[0].name == "rounds" and plan.schedules[0].own
    assert result.seconds == pytest.approx(3 * plan.schedules[0].seconds, rel=0.01)
    sent = result.ledger.total(direction="up")
    assert plan.up == pytest.approx(sent.payload / sent.messages, rel=0.02)
    down = result.ledger.total(direction="down")
    assert plan.down == pytest.approx(down.payload / down.messages, rel=0.02)
    assert sum(client.share for client in plan.clients) == pytest.approx(1)


def test_the_windows_of_fedfix_and_what_its_weights_do(file: Path) -> None:
    plan = plan_job(
        load_job(file, ["strategy={name: fedfix, window: 0.5}", "schedule={rounds: 3}"])
    )
    own, *others = plan.schedules
    assert own.name == "windows of 0.5 s"
    assert own.seconds == pytest.approx(0.5)
    shares = {client.client: client.share for client in plan.clients}
    assert own.counting.importance == pytest.approx(shares) and own.counting.bias < 1e-9
    assert {each.name.split()[0] for each in others} == {"rounds", "every", "windows", "groups"}


def test_the_command_shows_tables_json_and_a_picture(file: Path, tmp_path: Path) -> None:
    shown = runner.invoke(app, ["federation", "plan", str(file)])
    assert shown.exit_code == 0, shown.output
    for text in ("rounds (the job's own)", "every arrival", "client-2", "with FedFix"):
        assert text in shown.stdout
    picture = tmp_path / "plan.svg"
    told = runner.invoke(app, ["federation", "plan", str(file), "--json", "--plot", str(picture)])
    found = json.loads(told.stdout)
    assert [client["client"] for client in found["clients"]] == ["client-0", "client-1", "client-2"]
    for schedule in found["schedules"]:
        for weights in ("equal", "counting"):
            assert sum(schedule[weights]["importance"].values()) == pytest.approx(1)
    assert picture.read_text().startswith("<svg")


def test_what_cannot_be_planned(file: Path) -> None:
    refused = runner.invoke(app, ["federation", "plan", str(file), "devices=equal"])
    assert refused.exit_code == 2 and "log_uniform" in refused.stderr
    with pytest.raises(ConfigurationError, match="secure sum"):
        plan_job(load_job(file, ["secure=true", "strategy=fedavg"]))


TIMES = {"a": 1.0, "b": 2.0, "c": 30.0}
DEVICES = {name: DeviceProfile(taken / 10) for name, taken in TIMES.items()}
CLIENTS = [Expected(name, 10, 1 / 3, 10, taken) for name, taken in TIMES.items()]


def test_other_schedules_of_a_job_with_a_deadline_and_with_a_sample() -> None:
    own, *_ = plan_schedules(Deadline(5, seconds=4.0), CLIENTS, DEVICES)
    assert own.name == "rounds of at most 4 s"
    assert own.equal.arrivals == pytest.approx({"a": 1, "b": 1, "c": 0})
    own, everyone, *_ = plan_schedules(Sync(5, Uniform(2)), CLIENTS, DEVICES)
    assert (own.name, everyone.name) == ("rounds of 2", "rounds")
    assert own.seconds == pytest.approx((2 + 30 + 30) / 3) and everyone.seconds == 30
    groups = plan_schedules(Sync(5), CLIENTS, DEVICES)[-1]
    assert groups.name == "groups of 2 to 10 steps"
    assert groups.equal.arrivals["a"] > groups.equal.arrivals["c"]
    with pytest.raises(ConfigurationError, match="4 clients"):
        plan_schedules(Sync(5, Uniform(4)), CLIENTS, DEVICES)


def test_a_schedule_that_has_no_plan_is_named() -> None:
    class Never(Schedule):
        def on(self, event, fed):
            return []

    with pytest.raises(ConfigurationError, match="Never"):
        plan_schedules(Never(), CLIENTS, DEVICES)
