"""A server with a console and models that pretend, as a process: it can be killed.

``python -m tests.console.serving PORT STATE [STEP_SECONDS]``
"""

from __future__ import annotations

import sys
from pathlib import Path

from anabranch.api import ServerOptions, bind, create_app
from anabranch.api.server import serve
from anabranch.console import ConsoleOptions, install
from anabranch.jobs import Workspace
from tests.api.conftest import EchoModel
from tests.api.fake_trainer import TrainingModel


def main() -> None:
    port, state = int(sys.argv[1]), Path(sys.argv[2])
    step_seconds = float(sys.argv[3]) if len(sys.argv) > 3 else 0.0
    listener = bind("127.0.0.1", port)
    models = [TrainingModel(step_seconds=step_seconds), EchoModel("slow", delay=0.1)]
    models[0].source = "smollm2"
    models[0].time_between_tokens = 0.05
    app = create_app(models, ServerOptions(workspace=Workspace.open(state), run_jobs=True))
    install(app, ConsoleOptions(runs=state / "runs"))
    serve(app, listener, 2.0, on_listening=lambda url: print(url, flush=True))  # noqa: T201


if __name__ == "__main__":
    main()
