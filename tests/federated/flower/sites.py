"""Sites that residents import, and a Flower App whose federation leaves its result in a file."""

from __future__ import annotations

import json
import os
from pathlib import Path

from anabranch.federated import Federation, Sync
from anabranch.federated.codecs import ErrorFeedback, TopK
from anabranch.federated.runtimes.flower import Flower, Place
from anabranch.files import write_text
from tests.federated.helpers import EXAMPLES, VectorClient, VectorServer, names

ROUNDS = 2

PROJECT = """
[project]
name = "vectors"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "anabranch"

[tool.flwr.app.components]
serverapp = "app:server"
clientapp = "app:client"

[tool.flwr.app.config]
output = ""
"""

APP = '''
"""Vectors over Flower."""

from flwr.serverapp import ServerApp

from anabranch.federated.runtimes.flower import client_app
from tests.federated.flower.sites import run

client = client_app("tests.federated.flower.sites:site")
server = ServerApp()


@server.main()
def main(grid, context):
    run(grid, context.run_config["output"])
'''


class Tells(VectorClient):
    """Says which process it works in."""

    def run(self, ctx, kind, payload):
        ctx.report(pid=os.getpid())
        return super().run(ctx, kind, payload)


def codec():
    return ErrorFeedback(TopK(0.5))


def site(settings):
    return Place(names(9)[settings["index"]], Tells(), examples=EXAMPLES, up=codec())


def federation(runtime, **options):
    return Federation(VectorServer(), Tells(), Sync(ROUNDS), runtime, codec=codec(), **options)


def run(grid, output):
    made = federation(Flower(grid, clients=2, join_timeout=120))
    result = made.run()
    write_text(
        Path(output),
        json.dumps(
            {
                "x": made.server.x["x"].tolist(),
                "traffic": {
                    " ".join(map(str, key)): [traffic.messages, traffic.payload]
                    for key, traffic in result.ledger.by(
                        "direction", "client", "kind", "version"
                    ).items()
                },
                "pids": [row["pid"] for row in result.history],
                "incidents": len(result.incidents),
            }
        ),
    )


def write_app(folder):
    write_text(folder / "pyproject.toml", PROJECT)
    write_text(folder / "app.py", APP)
    return folder
