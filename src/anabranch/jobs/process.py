"""Which process holds a lease, and whether it is known to be gone."""

from __future__ import annotations

import os
import socket
import uuid
from pathlib import Path

import psutil


def own_name() -> str:
    """A name that no other process, past or future, has; a second call gives another one."""
    pid = os.getpid()
    started = psutil.Process(pid).create_time()
    return f"{_place()}/{pid}/{started:.2f}/{uuid.uuid4().hex[:8]}"


def is_gone(name: str) -> bool:
    """Whether the named process ran on this machine and has ended.

    False if it ran elsewhere: then only the age of its last sign of life can tell.
    """
    place, pid, started, _ = name.rsplit("/", 3)
    if place != _place():
        return False
    try:
        return abs(psutil.Process(int(pid)).create_time() - float(started)) > 0.02
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False


def _place() -> str:
    """Host and process namespace: two containers may share a host name and a folder."""
    try:
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        namespace = ""
    return f"{socket.gethostname()}/{namespace}"
