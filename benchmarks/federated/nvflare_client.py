"""A client of ``nvflare_driver.py``: NVFlare runs this file in a process for each of its turns."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import nvflare.client as flare
import torch
import torch.nn.functional as F
from nvflare_driver import RATE, Job, Perceptron


def main(path: str, steps: int, marks: str) -> None:
    flare.init()
    torch.set_num_threads(1)
    job = Job(path)
    own = job.own(int(flare.get_site_name().removeprefix("site-")) - 1)
    while flare.is_running():
        given = flare.receive()
        if given is None:
            break
        with Path(marks).open("a") as file:
            file.write(json.dumps([given.current_round, time.time()]) + "\n")
        model = Perceptron()
        if given.params:  # none in the first round; all begin with the same weights
            model.load_state_dict({n: torch.as_tensor(v) for n, v in given.params.items()})
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        for _ in range(steps):
            batch = own[torch.randperm(len(own))[: job.batch]]
            optimizer.zero_grad()
            F.cross_entropy(model(job["pixels"][batch]), job["labels"][batch]).backward()
            optimizer.step()
        weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
        meta = {"NUM_STEPS_CURRENT_ROUND": len(own)}
        flare.send(flare.FLModel(params=weights, meta=meta))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
