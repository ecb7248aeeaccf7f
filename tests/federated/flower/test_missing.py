"""Without Flower: said at once, and nothing is spoiled."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from anabranch.cli import app
from anabranch.errors import ConfigurationError
from anabranch.federated.job import load_job
from tests.federated.processes.test_job import file  # noqa: F401

PACKAGE = "anabranch.federated.runtimes.flower"


def test_flower_is_not_installed(
    file: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [name for name in sys.modules if name.startswith(PACKAGE)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "flwr", None)
    output = tmp_path / "out"
    done = CliRunner().invoke(
        app, ["federate", str(file), "--runtime", "flower", "-o", str(output)]
    )
    assert done.exit_code == 3
    assert "pip install 'flwr>=1.41,<1.42'" in " ".join(done.stderr.split())
    assert not output.exists()


def test_options_are_checked_without_it(file: Path) -> None:  # noqa: F811
    assert load_job(file, ["runtime=flower"]).runtime == "flower"
    with pytest.raises(ConfigurationError, match="flower has none"):
        load_job(file, ["runtime=flower", "workers=2"])
    with pytest.raises(ConfigurationError, match="as fast as they are"):
        load_job(file, ["runtime=flower", "devices=log_uniform"])
