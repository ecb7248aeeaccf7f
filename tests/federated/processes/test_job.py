"""A job file in worker processes: the adapter of the same job in simulation, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from anabranch.cli import app
from anabranch.errors import ConfigurationError
from anabranch.federated import Simulation
from anabranch.federated.job import load_job
from anabranch.federated.runtimes.processes import Processes
from tests.federated.test_job import JOB
from tests.federated.tiny_recipe import write_recipe


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.set_num_threads(1)
    write_recipe(tmp_path)
    path = tmp_path / "job.yaml"
    path.write_text(JOB.replace("devices: log_uniform\n", ""))
    return path


@pytest.mark.slow
def test_a_job_in_processes_saves_the_adapter_of_simulation(file: Path, tmp_path: Path) -> None:
    saved = {}
    for runtime in ("simulation", "processes"):
        output = tmp_path / runtime
        workers = ["workers=1"] if runtime == "processes" else []
        command = ["federate", str(file), *workers, "--runtime", runtime, "-o", str(output)]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
        assert json.loads((output / "job.json").read_text())["runtime"] == runtime
        saved[runtime] = (output / "adapter" / "adapter_model.safetensors").read_bytes()
    assert saved["processes"] == saved["simulation"]


def test_the_runtime_is_a_key_of_the_job(file: Path) -> None:
    assert isinstance(load_job(file).make_runtime([], torch.nn.Linear(1, 1)), Simulation)
    made = load_job(file, ["runtime=processes", "workers=3"])
    runtime = made.make_runtime([], torch.nn.Linear(1, 1))
    assert isinstance(runtime, Processes) and runtime.workers == 3


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["runtime=threads"], "'simulation', 'processes', 'ray' or 'flower'"),
        (["workers=2"], "workers are for runtime: processes or ray"),
        (["runtime=processes", "workers=0"], "workers"),
        (["runtime=processes", "devices=log_uniform"], "as fast as they are"),
    ],
)
def test_mistakes_are_named(file: Path, overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        load_job(file, overrides)
