"""Runs a Python program that nobody has read: in a process of its own, within limits, then killed.

The process has no network (a network namespace of its own, where the kernel allows it) and is
limited in memory, processor time and size of files; its working folder is empty and goes away.
Files cannot be written, and processes, sockets and foreign functions are refused by an audit hook,
which Python code cannot take back. This holds mistakes of a model, and is no wall against an
attacker: for hostile code use a container or a virtual machine as well.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

GUARD = Path(__file__).with_name("sandbox_guard.py")


@dataclass(frozen=True)
class Limits:
    """``seconds`` of real time, bytes of ``memory`` (address space) and of any one file."""

    seconds: float = 5.0
    memory: int = 2**30
    file: int = 2**20


LIMITS = Limits()


@dataclass(frozen=True)
class Verdict:
    """Whether a program ran to its end without an error; else why not."""

    passed: bool
    reason: str = ""


def run_program(program: str, limits: Limits = LIMITS) -> Verdict:
    """Run it to its end, its error, or its limit, whichever comes first.

    A program that ends itself (``sys.exit``, ``os._exit``) has not reached its end.
    """
    token = secrets.token_hex(16)
    order = json.dumps({**asdict(limits), "token": token, "program": program})
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as verdict:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(GUARD)],
            stdin=subprocess.PIPE,
            stdout=verdict,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": os.defpath, "LC_ALL": "C.UTF-8"},
            start_new_session=True,
        )
        try:
            process.communicate(order.encode(), timeout=limits.seconds)
        except subprocess.TimeoutExpired:
            return Verdict(False, f"still running after {limits.seconds:g} s")
        finally:
            _kill(process)
        verdict.seek(0)
        return _read(verdict.read(limits.file), token, process.returncode)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The process and whatever it may have started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(written: bytes, token: str, code: int) -> Verdict:
    try:
        found = json.loads(written)
        if found["token"] == token:  # only the guard knows it
            return Verdict(not found["error"], str(found["error"]))
    except (ValueError, KeyError, TypeError):
        pass
    how = f"killed by signal {-code}" if code < 0 else f"exit status {code}"
    return Verdict(False, f"ended before its end: {how}")
