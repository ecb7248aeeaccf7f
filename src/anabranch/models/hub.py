"""Fetching from the Hugging Face hub: fast to fail, never a pickle, never half a model."""

from __future__ import annotations

import contextlib
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from anabranch.errors import ModelCorrupt, ModelError, ModelNotFound, ModelUnsupported
from anabranch.models.checks import PICKLES, check_folder
from anabranch.models.progress import Progress

WANTED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "README.md", "LICENSE*")
_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?")
_ANSWER_SECONDS = 10.0
T = TypeVar("T")


def is_id(name: str) -> bool:
    """Whether this can be a hub id: ``name``, ``org/name``, either with ``@revision``."""
    repository, _ = _split(name)
    allowed = len(repository) <= 96 and ".." not in name and "--" not in repository
    return allowed and repository[-1:].isalnum() and _ID.fullmatch(name) is not None


def downloaded(name: str) -> Path | None:
    """The folder of a whole model that another tool has put into the hub's own cache, if any."""
    from huggingface_hub import try_to_load_from_cache

    repository, revision = _split(name)
    found = try_to_load_from_cache(repository, "config.json", revision=revision)
    if not isinstance(found, str):
        return None
    with contextlib.suppress(ModelError):  # not whole: it will be fetched
        return check_folder(Path(found).parent).folder
    return None


def fetch(name: str, folder: Path, progress: Progress) -> str:
    """Download a model's files to ``folder``; returns the exact revision.

    Raises :class:`ModelNotFound` with the reason if the hub cannot be reached or refuses.
    """
    from huggingface_hub import snapshot_download

    info = describe(name)
    repository, _ = _split(name)
    files = {f.rfilename: f.size for f in info.siblings or []}
    weights = [f for f in files if f.endswith(".safetensors") and "/" not in f]
    if not weights:
        pickled = next((f for f in files if f.endswith(PICKLES)), None)
        why = (
            f"only pickled weights ({pickled}), and loading a pickle runs whatever code is in it"
            if pickled
            else "no safetensors weights"
        )
        raise ModelUnsupported(f"the hub model {name!r} has {why}; choose one with safetensors")
    total = sum(files[f] or 0 for f in weights)
    progress(f"downloading {name} ({total / 1e6:.0f} MB)", 0.0)
    try:
        snapshot_download(
            repository,
            revision=info.sha,
            local_dir=folder,
            allow_patterns=list(WANTED),
            # A sentence encoder keeps its pooling in a subfolder; others keep duplicates there.
            ignore_patterns=None if "modules.json" in files else ["*/*"],
        )
    except Exception as error:
        raise ModelNotFound(
            f"downloading {name!r} from the hub failed: {_reason(error)}"
        ) from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the client's own notes
    for file, size in files.items():
        path = folder / file
        if path.is_file() and size is not None and path.stat().st_size != size:
            raise ModelCorrupt(
                f"{file} of {name!r} arrived with {path.stat().st_size} bytes, expected {size}; "
                f"try again"
            )
    progress(f"downloaded {name}", 1.0)
    return str(info.sha)


def describe(name: str) -> Any:
    """What the hub knows about a model: its revision and files. Answers or fails in seconds."""
    from huggingface_hub import HfApi

    repository, revision = _split(name)
    try:
        return _in_time(
            lambda: HfApi().model_info(
                repository, revision=revision, timeout=_ANSWER_SECONDS / 2, files_metadata=True
            )
        )
    except Exception as error:
        raise ModelNotFound(_reason(error)) from error


def _split(name: str) -> tuple[str, str | None]:
    repository, _, revision = name.partition("@")
    return repository, revision or None


def _reason(error: Exception) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return "the hub is switched off by HF_HUB_OFFLINE"
    if isinstance(error, errors.GatedRepoError):
        return "the hub has it, but asks for a token of somebody who accepted its licence"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the hub knows no such model, or it is private and needs a token"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the hub knows the model, but not this revision"
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"the hub could not be reached ({first_line})"


def _in_time(ask: Callable[[], T]) -> T:
    """Run ``ask``, but no longer than the time limit: name look-ups ignore socket timeouts."""
    answer: list[T] = []
    failure: list[Exception] = []

    def run() -> None:
        try:
            answer.append(ask())
        except Exception as error:
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True, name="hub-request")
    thread.start()
    thread.join(_ANSWER_SECONDS)
    if failure:
        raise failure[0]
    if not answer:
        raise TimeoutError(f"no answer in {_ANSWER_SECONDS:g} seconds")
    return answer[0]
