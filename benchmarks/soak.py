"""Keeps a server busy for minutes and watches its memory and its steps.

    python -m benchmarks.soak [--streams 64] [--minutes 5] [--weights int8] [--json FILE]

Streams of random lengths follow each other on a model behind its asyncio face; some are cut off in
the middle, as clients do. Memory is compared between the end of the first minute, when everything
has been allocated once, and the end. Exits with 1 if it grew by more than 2 % or a step took more
than five times the median.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from anabranch import models
from anabranch.claims.base import machine
from anabranch.models.protocol import SamplingParameters
from anabranch.serving import EngineModel, EngineOptions

KV_MEMORY = 2**29
"""Bytes; little enough to be full, and from then on used again, within the first minute."""
WARM_UP_SECONDS = 60.0
GROWTH, SLOWEST = 1.02, 5.0


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default=models.DEFAULT)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--weights", choices=("bf16", "int8"), default="int8")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    report = asyncio.run(soak(options))
    Console().print_json(data=report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    sys.exit(0 if report["holds"] else 1)


async def soak(options: argparse.Namespace) -> dict[str, Any]:
    """Run the streams and measure."""
    seconds = 60 * options.minutes
    settings = EngineOptions(weights=options.weights, kv_memory=KV_MEMORY)
    model = EngineModel.load(options.model, options=settings)
    steps = time_steps(model)
    process = psutil.Process()
    await model.start()
    began = time.monotonic()
    streams = [
        asyncio.create_task(stream(model, random.Random(seed), began + seconds))
        for seed in range(options.streams)
    ]
    await asyncio.sleep(min(WARM_UP_SECONDS, seconds / 2))
    before, first = process.memory_info().rss, len(steps)
    samples = asyncio.create_task(sample(process))
    finished = sum(await asyncio.gather(*streams))
    after = process.memory_info().rss
    samples.cancel()
    generated = model.statistics().generated_tokens
    await model.close()
    measured = steps[first:]
    median, slowest = statistics.median(measured), max(measured)
    return {
        "streams": options.streams,
        "seconds": round(seconds),
        "requests": finished,
        "tokens_per_second": round(generated / seconds, 1),
        "steps": len(measured),
        "step_median_ms": round(1e3 * median, 1),
        "step_slowest_ms": round(1e3 * slowest, 1),
        "step_slowest_ratio": round(slowest / median, 2),
        "memory_mib": [round(before / 2**20), round(after / 2**20)],
        "memory_ratio": round(after / before, 4),
        "memory_mib_every_30_seconds": await samples,
        "holds": after <= GROWTH * before and slowest <= SLOWEST * median,
        "machine": machine(),
    }


async def sample(process: psutil.Process) -> list[int]:
    """Resident MiB every 30 seconds until cancelled."""
    taken: list[int] = []
    try:
        while True:
            taken.append(round(process.memory_info().rss / 2**20))
            await asyncio.sleep(30)
    except asyncio.CancelledError:
        return taken


def time_steps(model: EngineModel) -> list[float]:
    """Seconds of every step from now on."""
    seconds: list[float] = []
    step = model.engine.step

    def timed() -> Any:
        began = time.perf_counter()
        outputs = step()
        seconds.append(time.perf_counter() - began)
        return outputs

    model.engine.step = timed  # type: ignore[method-assign]
    return seconds


async def stream(model: EngineModel, rng: random.Random, until: float) -> int:
    """One client: request after request; one in ten is closed before its end."""
    requests = 0
    while time.monotonic() < until:
        prompt = [rng.randrange(100, 40_000) for _ in range(rng.randrange(1, 400))]
        sampling = SamplingParameters(rng.randrange(1, 200), ignore_eos=True, seed=requests)
        generation = await model.complete(prompt, sampling)
        patience = rng.randrange(1, 2000)
        async for delta in generation:
            patience -= len(delta.token_ids)
            if patience <= 0 or time.monotonic() > until + 5:
                await generation.aclose()
                break
        requests += 1
    return requests


if __name__ == "__main__":
    main()
