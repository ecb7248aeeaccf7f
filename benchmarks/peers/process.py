"""A driver as seen by the coordinator: a process that answers cells and is stopped in between.

Each side keeps its process over all rounds, so that sides can alternate cell by cell, within
seconds of each other, on a machine whose speed drifts over minutes. A side that is not measured is
stopped by a signal: whatever its threads wait for or poll, it uses no core.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.peers.cells import Cell
from benchmarks.peers.metrics import Metrics
from benchmarks.peers.sides import Side, public

REPOSITORY = Path(__file__).parents[2]
START_SECONDS = 900
CELL_SECONDS = 900


class DriverFailed(Exception):
    """A driver ended, hung or gave a wrong answer; the message ends with its last words."""


class Driver:
    """One side with one choice of settings. Loaded when constructed; stopped unless it answers."""

    def __init__(self, side: Side, settings: Mapping[str, Any], python: Path, log: Path) -> None:
        self._log = log
        module = f"benchmarks.peers.drivers.{side.driver}"
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [python, "-m", module, json.dumps(dict(settings))],
                cwd=REPOSITORY,
                env={**os.environ, **side.variables, "PYTHONPATH": str(REPOSITORY)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,  # its own process group: children are stopped with it
            )
        try:
            ready = self._answer(START_SECONDS)["ready"]
        except BaseException:
            self.close()
            raise
        self.description: dict[str, Any] = {**public(settings), **ready}
        self._signal(signal.SIGSTOP)

    def measure(self, cell: Cell, round_: int) -> Metrics:
        """Wake the driver for one cell."""
        self._signal(signal.SIGCONT)
        try:
            adapters = [i % cell.adapters for i in range(cell.requests)] if cell.adapters else None
            question = {
                "prompts": cell.prompts(round_),
                "output_tokens": cell.output_tokens,
                "adapters": adapters,
            }
            self._process.stdin.write(json.dumps(question) + "\n")  # type: ignore[union-attr]
            self._process.stdin.flush()  # type: ignore[union-attr]
            answer = self._answer(CELL_SECONDS)
        except BrokenPipeError:
            raise self._failure("it has ended") from None
        finally:
            self._signal(signal.SIGSTOP)
        lengths = {len(times) for times in answer["times"]}
        if lengths != {cell.output_tokens} or len(answer["times"]) != cell.requests:
            raise self._failure(f"asked for {cell.output_tokens} tokens, it gave {lengths}")
        return Metrics.of(answer["times"], answer["peak_memory"])

    def close(self) -> None:
        """End the driver and its children."""
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _answer(self, seconds: float) -> dict[str, Any]:
        """The next line. Lines are awaited by polling, so that a hanging driver is noticed."""
        output, text, deadline = self._process.stdout, b"", time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(output, selectors.EVENT_READ)  # type: ignore[arg-type]
            while not text.endswith(b"\n"):
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    raise self._failure(f"no answer in {seconds:.0f} seconds")
                piece = os.read(output.fileno(), 1 << 20)  # type: ignore[union-attr]
                if not piece:
                    raise self._failure("it has ended")
                text += piece
        return json.loads(text)

    def _signal(self, number: int) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)

    def _failure(self, what: str) -> DriverFailed:
        lines = self._log.read_text(errors="replace").split("\n")
        words = [line.strip() for line in lines if line.strip()]
        return DriverFailed(f"{what}; last: {words[-1] if words else 'nothing'} (log: {self._log})")
