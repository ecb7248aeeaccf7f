"""Drives this repository's engine in its own process, as the server does.

Options: ``model`` (a name), ``weights``, ``kv_cache``, ``kv_memory`` in bytes,
``adapters`` (folders).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from anabranch import __version__, models
from anabranch.models.dtype import fastest_dtype
from anabranch.models.protocol import SamplingParameters
from anabranch.serving import Engine, EngineOptions, Request
from anabranch.serving.adapters import AdapterCheckpoint
from anabranch.serving.runner.fused import FusedRunner
from benchmarks.peers.drivers.protocol import Run, Times, drive


def load(options: dict[str, Any]) -> tuple[Run, dict[str, Any]]:
    dtype = fastest_dtype(models.card(options["model"]), torch.device("cpu"))
    loaded = models.load(options["model"], dtype=dtype)
    runner = FusedRunner(
        loaded.network,
        loaded.card.context_length,
        weights=options["weights"],
        kv_cache=options["kv_cache"],
    )
    del loaded
    engine = Engine(
        runner, options=EngineOptions(kv_memory=options["kv_memory"], speculation="off")
    )

    served = [
        engine.add_adapter(str(index), AdapterCheckpoint.read(Path(folder)))
        for index, folder in enumerate(options["adapters"])
    ]

    def run(
        prompts: list[list[int]], output_tokens: int, times: Times, adapters: list[int] | None
    ) -> None:
        sampling = SamplingParameters(output_tokens, temperature=0.0, ignore_eos=True)
        for index, prompt in enumerate(prompts):
            adapter = served[adapters[index]] if adapters else None
            engine.add(Request(str(index), prompt, sampling, adapter=adapter))
        for output in engine.run():
            times.record(int(output.request_id), len(output.delta.token_ids))

    return run, {
        "version": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
    }


if __name__ == "__main__":
    drive(load)
