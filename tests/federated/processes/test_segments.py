"""Shared memory: what is written is read, and nothing outlives its owner."""

from __future__ import annotations

import errno
import io
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from anabranch.errors import ConfigurationError
from anabranch.federated.errors import StoreFull
from anabranch.federated.runtimes.processes.segments import (
    KEY_BYTES,
    PREFIX,
    VARIABLE,
    Segments,
    sweep,
)


@pytest.fixture
def segments():
    made = Segments.owned()
    yield made
    made.close()
    assert not made.folder.exists()


@pytest.mark.parametrize("data", [b"", b"a", bytes(range(256)) * 5000])
def test_what_was_put_is_read_until_it_is_removed(segments, data):
    key = segments.put(data)
    assert len(bytes.fromhex(key)) == KEY_BYTES
    assert segments.read(key) == data and segments.size(key) == len(data)
    view = segments.view(key)
    segments.remove(key)
    assert view == data and view.readonly
    with pytest.raises(FileNotFoundError):
        segments.read(key)


def test_memory_that_is_not_there_is_an_error_that_leaves_nothing(segments, monkeypatch):
    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(Path, "open", lambda *_, **__: Full())
    with pytest.raises(StoreFull, match="bytes left, and 4,096 are needed"):
        segments.put(bytes(4096))
    monkeypatch.undo()
    assert [path.name for path in segments.folder.iterdir()] == ["lock"]


def test_a_part_goes_with_what_is_in_it(segments):
    part = segments.part("worker")
    part.put(b"x")
    assert segments.part("worker").folder == part.folder
    part.close()
    assert not part.folder.exists() and segments.folder.exists()


def test_segments_live_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    made = Segments.owned()
    assert made.folder.parent == tmp_path
    made.close()
    monkeypatch.setenv(VARIABLE, str(tmp_path / "absent"))
    with pytest.raises(ConfigurationError, match="absent, where there is no folder"):
        Segments.owned()


def test_living_owners_are_left_alone_and_dead_ones_are_not(segments):
    code = (
        "import time; from anabranch.federated.runtimes.processes.segments import Segments;"
        "made = Segments.owned(); made.put(b'x' * 1000); print(made.folder, flush=True);"
        "time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    folder = Path(process.stdout.readline().strip())
    key = segments.put(b"mine")
    assert folder not in sweep()
    assert folder.exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 5
    while folder.exists() and time.monotonic() < deadline:
        sweep()
    assert not folder.exists()
    assert segments.read(key) == b"mine"


def test_an_owner_killed_before_it_locked_its_folder_is_swept(segments):
    draft = segments.folder.parent / f"{PREFIX}unlocked"
    draft.mkdir()
    assert draft in sweep()
    assert not draft.exists()
