"""Output tokens per second of the engine against transformers' ``generate``, in one run.

    python -m benchmarks.serving [--rounds 3] [--json]

Both sides use the same weights, number format, threads and prompts, and alternate. ``generate``
gets the whole batch at once with left padding, which is its best case here: all requests have the
same length and arrive together.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from anabranch import models
from anabranch.claims.base import machine
from anabranch.models.dtype import fastest_dtype
from anabranch.models.protocol import SamplingParameters
from anabranch.serving import Engine, EngineOptions, Request
from anabranch.serving.runner.transformers import TransformersRunner

CELLS = [(1, 32, 64), (16, 128, 64), (16, 32, 128), (64, 32, 32)]
"""Requests, prompt tokens, output tokens."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    dtype = fastest_dtype(models.card(models.DEFAULT), torch.device("cpu"))
    peer = models.load(models.DEFAULT, dtype=dtype).network
    loaded = models.load(models.DEFAULT, dtype=dtype)
    runner = TransformersRunner(loaded.network, loaded.card.context_length)

    rows = []
    for requests, prompt, output in CELLS:
        tokens = torch.randint(100, 40_000, (requests, prompt))
        sides: dict[str, Callable[[], None]] = {
            "anabranch": lambda t=tokens, n=output: serve(runner, t, n),  # type: ignore[misc]
            "transformers": lambda t=tokens, n=output: generate(peer, t, n),  # type: ignore[misc]
        }
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(options.rounds):
            for side, run in sides.items():
                began = time.perf_counter()
                run()
                seconds[side].append(time.perf_counter() - began)
        speed = {s: requests * output / statistics.median(t) for s, t in seconds.items()}
        rows.append(
            {
                "requests": requests,
                "prompt_tokens": prompt,
                "output_tokens": output,
                "output_tokens_per_second": {s: round(v, 1) for s, v in speed.items()},
                "ratio": round(speed["anabranch"] / speed["transformers"], 2),
            }
        )
        if not options.json:
            print(
                f"{requests:3} requests, {prompt:3} in, {output:3} out: "
                f"{speed['anabranch']:7.1f} tok/s, {rows[-1]['ratio']}x transformers"
            )
    if options.json:
        print(json.dumps({"dtype": str(dtype), "machine": machine(), "rows": rows}, indent=2))


def serve(runner: TransformersRunner, tokens: torch.Tensor, output: int) -> None:
    engine = Engine(
        runner, options=EngineOptions(kv_memory=2**30, prefix_reuse=False, speculation="off")
    )
    sampling = SamplingParameters(output, temperature=0.0, ignore_eos=True)
    engine.generate([Request(str(i), row, sampling) for i, row in enumerate(tokens.tolist())])


@torch.inference_mode()
def generate(model: torch.nn.Module, tokens: torch.Tensor, output: int) -> None:
    model.generate(  # type: ignore[operator]
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=output,
        min_new_tokens=output,
        do_sample=False,
    )


if __name__ == "__main__":
    main()
