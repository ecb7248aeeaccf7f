"""The process that works on a job, and the files it leaves behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from anabranch.jobs.attached import TETHER
from anabranch.jobs.kinds.base import Limits
from anabranch.jobs.layout import LOG, PROGRESS, RESULT
from anabranch.models.progress import PROGRESS_FILE

GRACE_SECONDS = 30.0
"""Between the request to stop and the end, in which a checkpoint is written."""

NICENESS = 10
"""Jobs give way to what is served beside them."""

_LOG_TAIL = 2000


class Child:
    """Starts ``command`` in ``folder``, in a process group of its own that dies with this process.

    Standard output becomes ``result.json``, standard error is appended to ``log.txt``.
    """

    def __init__(self, command: Sequence[str], folder: Path, limits: Limits) -> None:
        self._folder = folder
        self._limits = limits
        self._began = time.monotonic()
        self._stop_by: float | None = None
        self._read = 0
        folder.mkdir(parents=True, exist_ok=True)
        self._progress = folder / PROGRESS
        self._progress.unlink(missing_ok=True)
        inner, self._tether = os.pipe()
        environment = os.environ | {TETHER: str(inner), PROGRESS_FILE: str(self._progress)}
        if limits.threads is not None:
            environment["OMP_NUM_THREADS"] = str(limits.threads)
        try:
            with (folder / RESULT).open("wb") as out, (folder / LOG).open("ab") as log:
                self._process = subprocess.Popen(
                    command,
                    cwd=folder,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=log,
                    env=environment,
                    pass_fds=[inner],
                    start_new_session=True,
                )
        except BaseException:
            os.close(self._tether)
            raise
        finally:
            os.close(inner)
        niceness = max(NICENESS, os.getpriority(os.PRIO_PROCESS, 0))
        with contextlib.suppress(ProcessLookupError):  # it has ended already
            os.setpriority(os.PRIO_PGRP, self._process.pid, niceness)

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self._began

    @property
    def stopping(self) -> bool:
        """Whether it was asked to stop."""
        return self._stop_by is not None

    def stop(self) -> None:
        """Ask it to stop with a checkpoint, as Ctrl-C would; :meth:`poll` kills it if it does not.

        What it has written is kept in any case.
        """
        if self._stop_by is None:
            self._stop_by = time.monotonic() + GRACE_SECONDS
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGINT)

    def kill(self) -> None:
        """End it, and what it started, now."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self.close()

    def poll(self) -> int | None:
        """Its exit status, negative for a signal, or None while it runs."""
        status = self._process.poll()
        if status is None:
            if self._stop_by is not None and time.monotonic() > self._stop_by:
                self.kill()
                return self._process.returncode
            return None
        self.kill()  # whatever it started
        return status

    def news(self) -> list[dict[str, Any]]:
        """What it reported since the last call."""
        try:
            with self._progress.open("rb") as file:
                file.seek(self._read)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._read += len(whole)
        return [json.loads(line) for line in whole.splitlines()]

    def overdrawn(self, seconds_before: float) -> str | None:
        """The limit that it exceeds, in words. ``seconds_before`` are those of earlier attempts."""
        limits = self._limits
        if limits.seconds is not None and seconds_before + self.seconds > limits.seconds:
            return f"it took longer than its limit of {limits.seconds:g} s"
        if limits.memory_mb is not None:
            used = self._memory() / 2**20
            if used > limits.memory_mb:
                return f"it used {used:.0f} MiB; its limit is {limits.memory_mb} MiB"
        return None

    def last_words(self) -> str:
        """The end of its log: the last error, if there is one."""
        try:
            text = (self._folder / LOG).read_bytes()[-_LOG_TAIL:].decode("utf-8", "replace")
        except FileNotFoundError:
            return ""
        lines = [line for line in text.splitlines() if line.strip()]
        named = [line for line in lines if line.startswith("error: ")]
        return named[-1].removeprefix("error: ") if named else (lines[-1] if lines else "")

    def close(self) -> None:
        """Let go of the tether."""
        if self._tether >= 0:
            os.close(self._tether)
            self._tether = -1

    def _memory(self) -> int:
        total = 0
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(self._process.pid)
            for one in (process, *process.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    total += one.memory_info().rss
        return total
