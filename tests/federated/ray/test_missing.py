"""Without Ray: said at once, and nothing is spoiled."""

from __future__ import annotations

import sys

import pytest
from typer.testing import CliRunner

from anabranch.cli import app
from anabranch.errors import ConfigurationError
from anabranch.federated.job import load_job
from tests.federated.processes.test_job import file  # noqa: F401

PACKAGE = "anabranch.federated.runtimes.ray"


def test_ray_is_not_installed(file, tmp_path, monkeypatch):  # noqa: F811
    for name in [name for name in sys.modules if name.startswith(PACKAGE)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)
    output = tmp_path / "out"
    done = CliRunner().invoke(app, ["federate", str(file), "--runtime", "ray", "-o", str(output)])
    assert done.exit_code == 3
    assert "pip install 'anabranch[ray]'" in " ".join(done.stderr.split())
    assert not output.exists()


def test_options_are_checked_without_it(file):  # noqa: F811
    assert load_job(file, ["runtime=ray", "workers=3"]).workers == 3
    with pytest.raises(ConfigurationError, match="as fast as they are"):
        load_job(file, ["runtime=ray", "devices=log_uniform"])
