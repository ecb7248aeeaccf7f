"""The inside of :mod:`anabranch.evaluation.sandbox`: a script for an interpreter of its own.

Reads an order from standard input, shuts the doors, runs the program, and writes how it ended.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import resource
import sys

REFUSED = (
    "socket.",
    "subprocess.",
    "ctypes.",
    "shutil.",
    "ftplib.",
    "smtplib.",
    "urllib.",
    "os.fork",
    "os.forkpty",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.system",
    "os.kill",
    "os.putenv",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.chown",
    "os.setxattr",
    "pty.",
    "resource.setrlimit",
    "signal.pthread_kill",
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000


def refuse(event: str, arguments: tuple[object, ...]) -> None:
    """The audit hook."""
    if event == "open":
        flags = arguments[2]
        if isinstance(flags, int) and flags & WRITING:
            raise PermissionError(f"{event} {arguments[0]!r} for writing is refused here")
    elif event.startswith(REFUSED):
        raise PermissionError(f"{event} is refused here")


def shut(memory: int, seconds: float, file: int) -> None:
    """Limits that hold from now on; a network namespace if it can be had."""
    unshare = getattr(ctypes.CDLL(None, use_errno=True), "unshare", None)
    if unshare is not None:
        unshare(_NEW_USER | _NEW_NETWORK)
    cpu = math.ceil(seconds) + 1  # real time runs out first, and is what is reported
    for limit, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_FSIZE, file),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
    ):
        resource.setrlimit(limit, (most, most))
    sys.addaudithook(refuse)


def main() -> None:
    """One order, one verdict."""
    order = json.loads(sys.stdin.buffer.read())
    answer = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    program = order["program"]
    token, write, encode = order["token"], os.write, json.dumps
    shut(order["memory"], order["seconds"], order["file"])
    del order
    error = ""
    try:
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
    except SystemExit:
        error = "SystemExit: it ended itself"
    except BaseException as failure:
        error = f"{type(failure).__name__}: {failure}"[:500]
    write(answer, encode({"token": token, "error": error}).encode())
    os._exit(0)


if __name__ == "__main__":
    main()
