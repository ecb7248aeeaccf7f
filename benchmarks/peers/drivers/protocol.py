"""What a driver and the coordinator say to each other, one JSON object a line.

    coordinator                                  driver
    ----------- argv[1]: {"model": ..., ...} ---->  loads the model, once
    <---------- {"ready": {"version": ...}} ------
    ----------- {"prompts": [[..]], "output_tokens": n, "adapters": [..]} -->  all arrive now
    <---------- {"times": [[..]], "peak_memory": bytes} ---

``adapters[i]`` is the adapter of request ``i`` among those of the driver's options, null without.
``times[i][k]`` is when request ``i`` got its token ``k``, in seconds after the requests arrived.
Runs in every peer's environment: standard library only.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Run = Callable[[list[list[int]], int, "Times", list[int] | None], None]
"""Serves prompts to this many output tokens each, each on its adapter, recording every token."""


@dataclass
class Times:
    """When each request got its tokens."""

    requests: int
    began: float = field(default_factory=time.perf_counter)
    times: list[list[float]] = field(init=False)

    def __post_init__(self) -> None:
        self.times = [[] for _ in range(self.requests)]

    def record(self, request: int, tokens: int = 1) -> None:
        """A request has got tokens now."""
        self.times[request] += [time.perf_counter() - self.began] * tokens

    def record_all(self) -> None:
        """Every request has got a token now."""
        now = time.perf_counter() - self.began
        for times in self.times:
            times.append(now)


def drive(load: Callable[[dict[str, Any]], tuple[Run, dict[str, Any]]]) -> None:
    """Load with the options of the command line, then answer cells until standard input ends.

    ``load`` returns the engine's ``Run`` and a description for the results (version, settings).
    """
    # Engines print; the protocol keeps standard output to itself.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    run, description = load(json.loads(sys.argv[1]))
    answers.write(json.dumps({"ready": description}) + "\n")
    for line in sys.stdin:
        cell = json.loads(line)
        prompts, output_tokens = cell["prompts"], cell["output_tokens"]
        forget_peak_memory()
        times = Times(len(prompts))
        run(prompts, output_tokens, times, cell["adapters"])
        answer = {"times": times.times, "peak_memory": peak_memory()}
        answers.write(json.dumps(answer) + "\n")


def forget_peak_memory() -> None:
    """Start the peak anew. Where the system cannot, the peak is the process's own so far."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_memory() -> int:
    """Most resident bytes since :func:`forget_peak_memory`."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
