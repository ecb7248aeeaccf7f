"""Uploaded files: whole or not there, in pages, and swept after a crash."""

from __future__ import annotations

import hashlib
import io
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from anabranch.errors import ConfigurationError, InvalidRequest
from anabranch.jobs import FileStore, UnknownFile, Workspace
from anabranch.jobs.errors import FileTooLarge


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[Workspace]:
    opened = Workspace.open(tmp_path / "state", max_file_bytes=3_000_000)
    yield opened
    opened.close()


@pytest.fixture
def files(workspace: Workspace) -> FileStore:
    return workspace.files


def test_saved_found_and_deleted(files: FileStore, workspace: Workspace) -> None:
    content = os.urandom(2_500_000)
    saved = files.save(io.BytesIO(content), "a.bin", "batch", owner="o")
    assert saved.size == len(content)
    assert saved.sha256 == hashlib.sha256(content).hexdigest()
    assert files.path(saved).read_bytes() == content
    assert Workspace.open(workspace.folder).files.get(saved.id, "o") == saved
    for method in (files.get, files.delete):
        with pytest.raises(UnknownFile):
            method(saved.id, "other")
    files.delete(saved.id, "o")
    with pytest.raises(UnknownFile):
        files.get(saved.id)
    assert not files.path(saved).exists()


def test_nothing_remains_of_what_is_refused(files: FileStore) -> None:
    def refuse(path: Path) -> None:
        assert path.read_bytes() == b"bad"
        raise InvalidRequest("file", "no")

    with pytest.raises(InvalidRequest):
        files.save(io.BytesIO(b"bad"), "a", "fine-tune", check=refuse)
    with pytest.raises(FileTooLarge, match="3000000"):
        files.save(io.BytesIO(bytes(3_000_001)), "a", "batch")
    assert list(files.folder.iterdir()) == []
    assert files.find().items == []
    assert files.save(io.BytesIO(bytes(3_000_000)), "a", "batch").size == 3_000_000


def test_pages_by_age_and_purpose(files: FileStore) -> None:
    ids = [files.save(io.BytesIO(b""), str(n), ("batch", "vision")[n % 2]).id for n in range(5)]
    page = files.find(limit=2)
    assert ([f.id for f in page.items], page.has_more) == (ids[:2:-1], True)
    page = files.find(limit=3, after=ids[3])
    assert ([f.id for f in page.items], page.has_more) == (ids[2::-1], False)
    page = files.find(after=ids[0], descending=False, purpose="vision")
    assert [f.id for f in page.items] == ids[1::2]
    with pytest.raises(InvalidRequest, match="after"):
        files.find(after="file-none")


def test_what_a_crash_left_is_swept_a_day_later(files: FileStore) -> None:
    kept = files.save(io.BytesIO(b"x"), "x", "batch")
    draft, orphan, fresh = (files.folder / name for name in (".d.tmp", "file-o", ".f.tmp"))
    for path in (draft, orphan, fresh):
        path.write_bytes(b"")
    yesterday = time.time() - 25 * 3600
    for path in (draft, orphan, files.path(kept)):
        os.utime(path, (yesterday, yesterday))
    assert files.sweep() == 2
    assert {p.name for p in files.folder.iterdir()} == {kept.id, fresh.name}


def test_folders_of_jobs_that_were_never_created_are_swept(workspace: Workspace) -> None:
    job = workspace.jobs.create("test", {})
    yesterday = time.time() - 25 * 3600
    for name in (job.id, "orphan", "fresh"):
        workspace.job_folder(name).mkdir(parents=True)
        if name != "fresh":
            os.utime(workspace.job_folder(name), (yesterday, yesterday))
    Workspace.open(workspace.folder).close()
    assert {f.name for f in (workspace.folder / "jobs").iterdir()} == {job.id, "fresh"}


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="--state"):
        Workspace.open(tmp_path / "file" / "state")
