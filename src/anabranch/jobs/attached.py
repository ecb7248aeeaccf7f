"""A command of this program as the process of a job: it ends when its runner does.

    python -m anabranch.jobs.attached federate job.yaml

The runner holds one end of a pipe (:data:`TETHER`). When that closes, however the runner ended,
the job's processes are killed, so that the next runner finds nobody at work in the job's folder.
"""

from __future__ import annotations

import os
import signal
import threading

TETHER = "ANABRANCH_TETHER"
"""Environment variable: the descriptor to read from."""


def hold() -> None:
    """Die with the runner, stop when it says so; nothing in a process that no runner started."""
    descriptor = os.environ.pop(TETHER, None)
    if descriptor is not None:
        # A server in the background of a script ignores Ctrl-C, and its children inherit that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Thread(target=_wait, args=(int(descriptor),), daemon=True).start()


def _wait(descriptor: int) -> None:
    while os.read(descriptor, 1):
        pass
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    hold()
    from anabranch.cli import main

    main()
