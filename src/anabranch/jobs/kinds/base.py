"""What a kind of job is."""

from __future__ import annotations

import hashlib
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, TypeVar

import yaml
from pydantic import Field

from anabranch.errors import ConfigurationError
from anabranch.jobs.layout import OUTPUT
from anabranch.jobs.records import Artefact
from anabranch.training.options import Section, parse_options


class Limits(Section):
    """What a job may use: seconds of running in all, MiB of memory, threads. None: anything."""

    seconds: Annotated[float | None, Field(gt=0)] = None
    memory_mb: Annotated[int | None, Field(ge=1)] = None
    threads: Annotated[int | None, Field(ge=1)] = None


class Terms(Section):
    """What every kind of job takes.

    A process that is killed (by the kernel, for want of memory) is started again up to ``retries``
    times; one that ends with an error is not, it would do so again.
    """

    retries: Annotated[int, Field(ge=0, le=100)] = 0
    limits: Limits = Limits()
    metadata: dict[str, str] = {}


Spec = TypeVar("Spec", bound=Terms)


class JobKind(ABC, Generic[Spec]):
    """Turns a job's spec into a command that can be stopped and started again."""

    name: ClassVar[str]
    spec: type[Spec]
    heading: ClassVar[str] = ""
    """What its jobs are called on a page; the name if empty."""
    example: ClassVar[str] = "{}\n"
    """A spec as YAML, to begin with."""

    def from_words(self, words: Sequence[str]) -> dict[str, Any]:
        """The spec that ``anabranch jobs submit KIND WORDS`` means: KEY=VALUE, values as YAML.

        Files are read here: the job runs in a folder of its own. Raises
        :class:`ConfigurationError`.
        """
        values = {}
        for word in words:
            key, equals, value = word.partition("=")
            if not equals:
                raise ConfigurationError(f"{word!r}: write KEY=VALUE for a job of {self.name!r}")
            try:
                values[key] = yaml.safe_load(value)
            except yaml.YAMLError as error:
                raise ConfigurationError(f"{word!r} is not YAML: {error}") from None
        return values

    def check(self, values: Mapping[str, Any]) -> Spec:
        """The spec with its defaults; :class:`ConfigurationError` names every mistake.

        Nothing is loaded, so that a person waits for the answer.
        """
        return parse_options(self.spec, dict(values))

    @abstractmethod
    def title(self, spec: Spec) -> str:
        """A few words for a list of jobs."""

    @abstractmethod
    def command(self, spec: Spec, folder: Path) -> list[str]:
        """What to run in ``folder``. The same command goes on with what it finds there."""

    def succeeded(self, status: int, folder: Path) -> bool:
        """Whether it did its work, from its exit status and what it left."""
        return status == 0

    def artefacts(self, folder: Path) -> Iterable[Artefact]:
        """What it made."""
        output = folder / OUTPUT
        for path in sorted(output.iterdir()) if output.is_dir() else ():
            if not path.name.startswith("."):
                yield artefact(path)


def anabranch(*arguments: str) -> list[str]:
    """The command that runs this program with these arguments as the process of a job."""
    return [sys.executable, "-m", "anabranch.jobs.attached", *arguments]


@contextmanager
def as_file(text: str, name: str) -> Iterator[Path]:
    """A text as a file, for as long as it is read."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_text(text, "utf-8")
        yield path


def artefact(path: Path) -> Artefact:
    """A file with its digest, or a folder."""
    if path.is_dir():
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        return Artefact(path.name, str(path), size)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Artefact(path.name, str(path), path.stat().st_size, digest)
