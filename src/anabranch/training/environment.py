"""What a run must record of its surroundings to be repeated."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

VERSIONS_OF = ("anabranch", "torch", "transformers", "peft", "numpy", "tokenizers")


def environment(folder: Path) -> dict[str, Any]:
    """Versions, machine, and the git commit of ``folder`` (the recipe's project)."""
    import psutil
    import torch

    return {
        "versions": {name: _version(name) for name in VERSIONS_OF}
        | {"python": platform.python_version()},
        "machine": {
            "system": platform.system(),
            "architecture": platform.machine(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "git": git_commit(folder),
    }


def git_commit(folder: Path) -> dict[str, Any] | None:
    """Commit of the repository around a folder, and whether files differ; None without one."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
