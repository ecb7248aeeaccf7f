"""The federation of ``python -m benchmarks.federated`` in NVFlare's simulator; in its environment.

    python nvflare_driver.py JOB.npz ROUNDS LOCAL_STEPS CORES

Prints the time at which each round but the last ended, which is when the next one's first client
got the model, and the accuracy after the last, as JSON. Local training is a plain torch loop.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

RATE = 0.1
CLIENT = Path(__file__).with_name("nvflare_client.py")


class Perceptron(nn.Sequential):
    """By its name and without arguments NVFlare can make one, too."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


class Job:
    """The data, and who owns what."""

    batch = 16

    def __init__(self, path: str) -> None:
        with np.load(path) as data:
            self._data = {name: torch.from_numpy(data[name]) for name in data.files}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._data[name]

    def own(self, client: int) -> torch.Tensor:
        return self["indices"][self["owners"] == client]


def main(path: str, rounds: int, steps: int, cores: int) -> dict[str, Any]:
    from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
    from nvflare.recipe import SimEnv

    # Where the clients' file, of which NVFlare makes a copy, finds this one.
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    job = Job(path)
    clients = int(job["owners"].max()) + 1
    with tempfile.TemporaryDirectory() as folder:
        marks = Path(folder) / "marks"
        recipe = FedAvgRecipe(
            name="digits",
            model={"class_path": "nvflare_driver.Perceptron", "args": {}},
            min_clients=clients,
            num_rounds=rounds + 1,  # how long the last one takes is not seen
            train_script=str(CLIENT),
            train_args=f"{path} {steps} {marks}",
        )
        env = SimEnv(num_clients=clients, num_threads=cores, workspace_root=folder)
        recipe.execute(env)
        seen = [json.loads(line) for line in marks.read_text().splitlines()]
        saved = next(Path(folder).rglob("FL_global_model.pt"))
        weights = torch.load(saved, weights_only=False)["model"]
    model = Perceptron()
    model.load_state_dict({name: torch.as_tensor(value) for name, value in weights.items()})
    right = model(job["test_pixels"]).argmax(1) == job["test_labels"]
    numbers = [number for number, _ in seen]
    return {
        "ended": [min(at for number, at in seen if number == n) for n in range(rounds + 1)],
        "accuracy": float(right.double().mean()),
        "averaged": [numbers.count(n) for n in range(rounds)],
    }


if __name__ == "__main__":
    found = main(sys.argv[1], *map(int, sys.argv[2:]))
    print("RESULT " + json.dumps(found), flush=True)
