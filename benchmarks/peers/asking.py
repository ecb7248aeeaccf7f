"""One question to a peer's interpreter: a script, its arguments, a line of JSON as the answer."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any


class PeerFailed(Exception):
    """A peer's process ended without an answer; the message has its last words."""


def ask(python: Path, script: Path, *arguments: object, folder: Path, seconds: float) -> Any:
    """Run a script in ``folder`` on one thread; what its last line of output says.

    Raises :class:`PeerFailed` if it fails or takes longer than ``seconds``.
    """
    try:
        ran = subprocess.run(
            list(map(str, (python, script, *arguments))),
            capture_output=True,
            text=True,
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        raise PeerFailed(f"no answer in {seconds:g} s") from None
    if ran.returncode:
        raise PeerFailed((ran.stderr.strip() or "no message").splitlines()[-1])
    return json.loads(ran.stdout.splitlines()[-1])
