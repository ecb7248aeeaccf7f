"""Artefacts as downloads: the right bytes, the same every time, and nothing beside them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anabranch.downloads import Download, LeadsOutside
from anabranch.errors import AnabranchError
from anabranch.jobs import Artefact, Report, UnknownArtefact, UnknownJob, Workspace
from anabranch.jobs.kinds.base import artefact
from anabranch.jobs.layout import OUTPUT
from anabranch.jobs.service import Jobs


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    workspace = Workspace.open(tmp_path / "state")
    yield Jobs(workspace)
    workspace.close()


@pytest.fixture
def made(jobs: Jobs, tmp_path: Path) -> str:
    """A job of alice with a file, a folder, a link that leads out, and a stored file."""
    job = jobs.store.create("x", {}, owner="alice")
    output = jobs.workspace.job_folder(job.id) / OUTPUT
    (output / "model" / "deep").mkdir(parents=True)
    (output / "report.md").write_bytes(b"# report\n")
    (output / "model" / "deep" / "weights").write_bytes(b"w" * 3_000_000)
    (output / "model" / "empty").touch()
    (tmp_path / "secret").write_text("secret")
    (output / "away").symlink_to(tmp_path / "secret")
    csv = jobs.workspace.files.save(io.BytesIO(b"step\n1\n"), "metrics.csv", "fine-tune-results")
    assert jobs.store.claim(["x"]) is not None
    found = [artefact(output / name) for name in ("report.md", "model")]
    found.append(Artefact("away", str(output / "away"), 6, "0" * 64))
    found.append(Artefact("result_file", csv.id, csv.size, csv.sha256))
    jobs.store.record([Report(job.id, "succeeded", artefacts=found)])
    return job.id


def content(download: Download) -> bytes:
    data = b"".join(download.chunks())
    assert len(data) == download.size
    assert hashlib.sha256(data).hexdigest() == download.sha256
    return data


def test_files_folders_and_what_is_in_them(jobs: Jobs, made: str) -> None:
    assert [one.name for one in jobs.artefacts(made, "alice")] == [
        "away", "model", "report.md", "result_file",
    ]  # fmt: skip
    report = jobs.download(made, "report.md", "alice")
    assert (report.filename, content(report)) == ("report.md", b"# report\n")
    inside = jobs.download(made, "model/deep/weights", "alice")
    assert (inside.filename, inside.size) == ("weights", 3_000_000)
    assert content(inside) == b"w" * 3_000_000
    stored = jobs.download(made, "result_file", "alice")
    assert (stored.filename, content(stored)) == ("metrics.csv", b"step\n1\n")
    archive = jobs.download(made, "model", "alice")
    assert archive.filename == "model.zip"
    with zipfile.ZipFile(io.BytesIO(content(archive))) as opened:
        assert opened.testzip() is None
        assert opened.namelist() == ["model/deep/weights", "model/empty"]
        assert opened.read("model/deep/weights") == b"w" * 3_000_000


@pytest.mark.parametrize(
    "name",
    [
        "", "/", "..", "../secret", "report.md/..", "model/../../log.txt", "model//etc/passwd",
        "model/../report.md/../../../secret", "away", "away/", "/etc/passwd", "model/nothing",
        "model/\0", "model/" + "x" * 5000, "reports.md", "model/deep/../../../output/../..",
    ],
)  # fmt: skip
def test_nothing_else_is_handed_out(jobs: Jobs, made: str, name: str) -> None:
    with pytest.raises(UnknownArtefact, match=made):
        jobs.download(made, name, "alice")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(inside=st.text(alphabet="./\\ deep-weights\0", max_size=30))
def test_no_name_leads_out_of_an_artefact(jobs: Jobs, made: str, inside: str) -> None:
    folder = (jobs.workspace.job_folder(made) / OUTPUT / "model").resolve()
    with contextlib.suppress(UnknownArtefact):
        assert jobs.download(made, f"model/{inside}", "alice").path.is_relative_to(folder)


def test_another_owner_finds_no_job(jobs: Jobs, made: str) -> None:
    for ask in (jobs.artefacts, lambda i, o: jobs.download(i, "report.md", o)):
        with pytest.raises(UnknownJob):
            ask(made, "bob")
    folder = jobs.workspace.job_folder(made)
    assert jobs.may_read(folder / OUTPUT, "alice") and not jobs.may_read(folder / OUTPUT, "bob")
    assert jobs.may_read(Path("/elsewhere"), "bob")


def test_a_misspelt_name_is_answered_with_those_there_are(jobs: Jobs, made: str) -> None:
    with pytest.raises(UnknownArtefact, match=r"'modle'.*did you mean 'model'.*report\.md"):
        jobs.download(made, "modle", "alice")


def test_the_archive_of_the_same_files_has_the_same_bytes(tmp_path: Path) -> None:
    digests = []
    for copy in ("a", "b"):
        folder = tmp_path / copy / "adapter"
        folder.mkdir(parents=True)
        for name in ("z", "y") if copy == "a" else ("y", "z"):
            (folder / name).write_text(name)
        digests.append(Download.of(folder).sha256)
    assert digests[0] == digests[1]


def test_an_empty_folder_is_an_empty_archive(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with zipfile.ZipFile(io.BytesIO(content(Download.of(tmp_path / "empty")))) as opened:
        assert opened.namelist() == []


def test_a_folder_with_a_link_that_leads_out_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "inside").write_text("x")
    (tmp_path / "folder" / "also").symlink_to("inside")
    assert Download.of(tmp_path / "folder").size > 0
    (tmp_path / "folder" / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(LeadsOutside, match="link"):
        Download.of(tmp_path / "folder")


def test_saving_overwrites_nothing_and_notices_a_change(tmp_path: Path) -> None:
    source, target = tmp_path / "file", tmp_path / "target"
    source.write_text("one")
    found = Download.of(source)
    assert found.save(target).read_text() == "one"
    with pytest.raises(AnabranchError, match="exists"):
        found.save(target)
    (target / "file").unlink()
    source.write_text("two")
    with pytest.raises(AnabranchError, match="changed"):
        found.save(target)
    assert list(target.iterdir()) == []
