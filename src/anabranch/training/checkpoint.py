"""Checkpoints on disk: written whole or not at all, verified before they are read.

A checkpoint is a folder ``step-N`` with ``state.json``, ``state.safetensors`` and
``manifest.json``, which holds the size and SHA-256 of the other two. It is written as
``step-N.tmp``, flushed to the disk and renamed, so that a process killed at any instant leaves the
previous checkpoints as they were. Behaviour when something fails:

========================  ==========================================================
killed while writing      ``step-N.tmp`` stays behind and is removed by the next save
disk full                 ``step-N.tmp`` is removed, the previous checkpoints stay
a file is damaged         the newest checkpoint that verifies is read, with a warning
========================  ==========================================================
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from anabranch.files import sync
from anabranch.training.errors import CheckpointError
from anabranch.training.state import join_tensors, split_tensors

logger = logging.getLogger(__name__)

FORMAT = 1
STATE, TENSORS, MANIFEST = "state.json", "state.safetensors", "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. ``identity`` says of which run it is."""

    step: int
    identity: Mapping[str, Any]
    state: Mapping[str, Any]


class CheckpointStore:
    """The checkpoints of one run, in ``folder``. The newest ``keep`` stay."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self._keep = keep

    def steps(self) -> list[int]:
        """Steps of which there is a checkpoint, verified or not, ascending."""
        found = []
        for path in self.folder.glob("step-*"):
            number = path.name.removeprefix("step-")
            if number.isdecimal() and path.is_dir():
                found.append(int(number))
        return sorted(found)

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return self.folder / f"step-{step}"

    def save(self, step: int, identity: Mapping[str, Any], state: Mapping[str, Any]) -> Path:
        """Write a checkpoint, then delete all but the newest.

        Raises :class:`CheckpointError` if it cannot be written; older ones are then untouched.
        """
        target, draft = self.path(step), self.folder / f"step-{step}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob("step-*.tmp"):
                shutil.rmtree(leftover)
            draft.mkdir()
            _write(draft, step, identity, state)
            if target.exists():
                # Only a damaged checkpoint that a resumed run went back behind is written again.
                shutil.rmtree(target)
            draft.rename(target)
            sync(self.folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(draft, ignore_errors=True)
            kept = ", ".join(f"step {s}" for s in self.steps()) or "none"
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {self.folder}: {error}; "
                f"checkpoints kept: {kept}"
            ) from error
        for old in self.steps()[: -self._keep]:
            shutil.rmtree(self.path(old), ignore_errors=True)
        return target

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that verifies, or None if there is none at all.

        Raises :class:`CheckpointError` if there are some and all are damaged.
        """
        problems = []
        for step in reversed(self.steps()):
            try:
                found = self.read(step)
            except CheckpointError as error:
                logger.warning("%s; trying the one before", error)
                problems.append(str(error))
            else:
                return found
        if problems:
            raise CheckpointError(
                f"no checkpoint in {self.folder} can be used: {'; '.join(problems)}. Start again "
                f"in another folder"
            )
        return None

    def read(self, step: int) -> Checkpoint:
        """Verify and read one; :class:`CheckpointError` if a file is not what was written."""
        folder = self.path(step)
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            for name, written in manifest["files"].items():
                if _fingerprint(folder / name) != written:
                    raise CheckpointError(f"{folder / name} is not what was written")
            if manifest["format"] != FORMAT:
                raise CheckpointError(
                    f"{folder} has format {manifest['format']}, this version reads {FORMAT}"
                )
            tree = json.loads((folder / STATE).read_text())
            state = join_tensors(tree, load_file(folder / TENSORS))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise CheckpointError(f"{folder} cannot be read: {error}") from error
        return Checkpoint(manifest["step"], manifest["identity"], state)


def _write(folder: Path, step: int, identity: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    tree, tensors = split_tensors(state)
    save_file({name: t.contiguous() for name, t in _unshared(tensors).items()}, folder / TENSORS)
    (folder / STATE).write_text(json.dumps(tree))
    files = {}
    for name in (STATE, TENSORS):
        sync(folder / name)
        files[name] = _fingerprint(folder / name)
    manifest = {"format": FORMAT, "step": step, "identity": identity, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    sync(folder / MANIFEST)
    sync(folder)


def _unshared(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Copies of tensors that share memory with an earlier one; safetensors stores no aliases."""
    seen: set[int] = set()
    own = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        own[name] = tensor.clone() if storage in seen and storage else tensor
        seen.add(storage)
    return own


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}
