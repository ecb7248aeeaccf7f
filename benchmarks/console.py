"""What open tabs of the console cost the engine: the same streams with and without them.

    python -m benchmarks.console [--tabs 20] [--streams 16] [--page engine] [--json FILE]

One server answers ``--streams`` streams without end. Short slices with the tabs open and with none
follow each other in the order ABBA, many times. Two neighbours are a pair, and whatever changes
slowly (other work on the machine, its temperature, the lengths of the streams) is the same for
both. The median of the pairs' ratios is reported with the 95 % interval that order statistics give
it: nothing is assumed of the noise but that it favours neither side. A tab is what a browser's is
to the server: it loads the page and keeps the web socket on which updates come; what a browser
spends on drawing is not the server's.

Two ratios: tokens per second, and the server's processor seconds per generated token, which other
work on the machine disturbs less. The verdict is ``holds`` if both intervals lie within 5 %,
``falls short`` if one lies outside, else ``undecided``: take more ``--rounds``. Exits with 0 only
if it holds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import socketio
from rich.console import Console

from anabranch.claims.base import machine

WORSE = 0.05
CONFIDENCE = 0.95
WARM_UP_SECONDS = 15.0
SETTLE_SECONDS = 1.0
"""Before a slice is measured, for tabs to open or close."""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.console",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tabs", type=int, default=20)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--page", default="engine", help="Which page the tabs show.")
    parser.add_argument("--rounds", type=int, default=15, help="Times ABBA.")
    parser.add_argument("--seconds", type=float, default=4.0, help="Of a slice.")
    parser.add_argument("--weights", choices=("bf16", "int8"), default="int8")
    parser.add_argument("--threads", type=int, default=None, help="Of the engine.")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    report = asyncio.run(measure(options))
    Console().print_json(data=report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    sys.exit(0 if report["verdict"] == "holds" else 1)


@dataclass(frozen=True)
class Slice:
    """Tokens per second, the server's processor seconds per token, and updates a tab and second."""

    tabs: int
    tokens_per_second: float
    processor_per_token: float
    updates: float


@dataclass(frozen=True)
class Ratio:
    """The median of paired ratios, and the interval that holds it with :data:`CONFIDENCE`."""

    median: float
    low: float
    high: float
    pairs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Ratio:
        """The interval is between the k-th least and the k-th greatest value, with the largest k
        for which a fair coin shows fewer than k heads in 2.5 % of the cases at most.
        """
        ordered, count = sorted(values), len(values)
        k, below = 0, 0.5**count
        while below <= (1 - CONFIDENCE) / 2:
            k += 1
            below += math.comb(count, k) * 0.5**count
        if not k:
            raise ValueError(f"{count} pairs are too few for an interval; take 6 or more")
        return cls(statistics.median(ordered), ordered[k - 1], ordered[-k], count)


def verdict(throughput: Ratio, processor: Ratio) -> str:
    """``holds``, ``falls short`` or ``undecided``."""
    if throughput.low >= 1 - WORSE and processor.high <= 1 + WORSE:
        return "holds"
    if throughput.high < 1 - WORSE or processor.low > 1 + WORSE:
        return "falls short"
    return "undecided"


def paired(slices: Sequence[Slice], name: str) -> Ratio:
    """With tabs over without, of the first and the second half of each ABBA."""
    ratios = []
    for one, other in zip(slices[::2], slices[1::2], strict=True):
        none, some = (one, other) if one.tabs == 0 else (other, one)
        ratios.append(getattr(some, name) / getattr(none, name))
    return Ratio.of(ratios)


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run the slices."""
    slices: list[Slice] = []
    async with AsyncExitStack() as stack:
        url, process = await stack.enter_async_context(server(options))
        client = await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=60))
        streams = [asyncio.create_task(stream(url, i)) for i in range(options.streams)]
        for each in streams:
            stack.callback(each.cancel)
        await asyncio.sleep(WARM_UP_SECONDS)
        for _ in range(options.rounds):
            for tabs in (0, options.tabs, options.tabs, 0):
                slices.append(await measure_slice(options, client, process, tabs))
        broken = [each.exception() for each in streams if each.done()]
        if broken:
            raise RuntimeError(f"a stream ended: {broken[0]!r}")
    throughput = paired(slices, "tokens_per_second")
    processor = paired(slices, "processor_per_token")
    some = [each for each in slices if each.tabs]
    return {
        "tabs": options.tabs,
        "streams": options.streams,
        "page": options.page,
        "slice_seconds": options.seconds,
        "throughput_ratio": vars(throughput),
        "processor_per_token_ratio": vars(processor),
        "updates_a_tab_and_second": statistics.median(each.updates for each in some),
        "verdict": verdict(throughput, processor),
        "slices": [vars(each) for each in slices],
        "machine": machine(),
    }


async def measure_slice(
    options: argparse.Namespace, client: httpx.AsyncClient, process: psutil.Process, tabs: int
) -> Slice:
    """Measure for a while with so many tabs open."""
    received = [0]
    async with AsyncExitStack() as stack:
        for _ in range(tabs):
            await stack.enter_async_context(tab(client, options.page, received))
        await asyncio.sleep(SETTLE_SECONDS)
        received[0] = 0
        tokens, spent, began = await generated(client), processor(process), time.perf_counter()
        await asyncio.sleep(options.seconds)
        seconds = time.perf_counter() - began
        tokens, spent = await generated(client) - tokens, processor(process) - spent
    updates = received[0] / seconds / tabs if tabs else 0.0
    if tabs and options.page == "engine" and updates < 0.5:
        raise RuntimeError(f"the tabs got only {updates:.2f} updates a second: are they open?")
    return Slice(tabs, tokens / seconds, spent / tokens, updates)


def processor(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


async def generated(client: httpx.AsyncClient) -> float:
    """Tokens that the server has generated so far."""
    text = (await client.get("/metrics")).text
    found = re.search(r"^anabranch_generated_tokens_total\{[^}]*\} (\S+)$", text, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"no generated tokens among the metrics:\n{text}")
    return float(found[1])


async def stream(url: str, number: int) -> None:
    """Ask for answers of 200 tokens, one after the other."""
    question = {"role": "user", "content": f"Tell a long story about river number {number}."}
    body = {"model": "smollm2", "messages": [question], "stream": True, "ignore_eos": True}
    async with httpx.AsyncClient(base_url=url, timeout=None) as client:
        while True:
            request = {**body, "max_tokens": 200}
            async with client.stream("POST", "/v1/chat/completions", json=request) as answer:
                answer.raise_for_status()
                async for _ in answer.aiter_bytes():
                    pass


@asynccontextmanager
async def tab(client: httpx.AsyncClient, page: str, received: list[int]) -> AsyncIterator[None]:
    """A page that is open: its HTML was loaded, its socket is connected."""
    html = (await client.get(f"/console/{page}")).text
    found = re.search(r"'client_id': '([0-9a-f-]+)'", html)
    if found is None:
        raise RuntimeError(f"/console/{page} is no page of the console:\n{html[:500]}")
    query = httpx.QueryParams(
        client_id=found[1],
        tab_id=str(uuid.uuid4()),
        document_id=str(uuid.uuid4()),
        next_message_id=0,
        implicit_handshake="true",
    )
    socket = socketio.AsyncClient(reconnection=False)

    @socket.on("*")
    async def update(event: str, data: Any) -> None:
        received[0] += 1

    address = str(client.base_url).rstrip("/")
    await socket.connect(
        f"{address}/?{query}",
        transports=["websocket"],
        socketio_path="/console/_nicegui_ws/socket.io",
    )
    try:
        yield
    finally:
        await socket.disconnect()


@asynccontextmanager
async def server(options: argparse.Namespace) -> AsyncIterator[tuple[str, psutil.Process]]:
    """A server with the default model, in a process of its own."""
    command = [sys.executable, "-m", "anabranch", "up", "--port", "0"]
    command += ["--weights", options.weights, "--max-model-len", "1024"]
    if options.threads:
        command += ["--threads", str(options.threads)]
    with tempfile.TemporaryDirectory() as state:
        process = subprocess.Popen(
            [*command, "--state", state],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_WAIT_POLICY": "passive", "PYTHONUNBUFFERED": "1"},
        )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if found := re.search(r"listening on (http://\S+)", line):
                    yield found[1], psutil.Process(process.pid)
                    return
            raise RuntimeError("the server ended before it listened")
        finally:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
