"""Ends what a deployment started once the deployment's own process is gone, however that ended.

    python -m anabranch.federated.runtimes.flower.warden NODE_FOLDER...

It hears on its standard input of each process that was started, as a line ``[pid, created]``. The
input ends with the deployment's process, kill -9 included. Then it ends those processes, what they
started, and the residents of the nodes, and exits.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from anabranch.closing import Closing
from anabranch.federated.runtimes.flower.resident import stop_residents

STOP_S = 10.0


class Warden(Closing):
    """The deployment's end of it."""

    def __init__(self, nodes: Sequence[Path]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, *map(str, nodes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # who kills the deployment's group does not kill it
        )

    def watch(self, pid: int, created: float) -> None:
        """End this process, too."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{json.dumps([pid, created])}\n".encode())
        self._process.stdin.flush()

    def close(self) -> None:
        """Let it end what is left, and go."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def end_all(wards: Sequence[tuple[int, float]]) -> None:
    """End those of these processes, by number and time of creation, that run still."""
    for pid, created in wards:
        # A number may belong to another process by now, which began at another time.
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).create_time() == created:
                end(pid)


def end(pid: int) -> None:
    """End a process and those that it started: by a word, then by force."""
    try:
        top = psutil.Process(pid)
        family = [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in family:
        _tell(process, signal.SIGTERM)
    _, left = psutil.wait_procs(family, timeout=STOP_S)
    for process in left:
        _tell(process, signal.SIGKILL)


def _tell(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the deployment decides what becomes of it
    told = [json.loads(line) for line in sys.stdin]
    end_all(told)
    for node in sys.argv[1:]:
        stop_residents(Path(node))
