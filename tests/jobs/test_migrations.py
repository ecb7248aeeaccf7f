"""Stores of other versions: lifted whole, refused, or left as they were."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import Connection

from anabranch.api.fine_tuning.spec import KIND
from anabranch.jobs import JobStore, StoreTooNew, database
from anabranch.jobs.errors import StoreUnusable
from anabranch.jobs.migrations import MIGRATIONS

NEWEST = 1 + len(MIGRATIONS)
FINE_TUNING = [f"ftjob-{digit * 24}" for digit in "12"]
RECIPE = f"job-{'3' * 32}"
EARLIER = Path(__file__).parent / "store_version_1.sql"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A store as version 1 wrote it."""
    path = tmp_path / "jobs.sqlite"
    with sqlite3.connect(path) as connection:
        connection.executescript(EARLIER.read_text("utf-8"))
    connection.close()
    return path


def version(file: Path) -> int:
    return int(_ask(file, "SELECT version FROM anabranch_schema")[0][0])


def kinds(file: Path) -> dict[str, str]:
    return dict(_ask(file, "SELECT id, kind FROM jobs"))


def tables(file: Path) -> dict[str, str]:
    found = _ask(file, "SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL")
    return {name: " ".join(sql.split()) for name, sql in found}


def _ask(file: Path, query: str) -> list[tuple[str, str]]:
    connection = sqlite3.connect(file)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


def test_an_earlier_store_is_lifted_with_all_that_is_in_it(file: Path, tmp_path: Path) -> None:
    for _ in range(2):  # the second time there is nothing to do
        store = JobStore(database.sqlite_url(file))
        assert version(file) == NEWEST
        assert kinds(file) == {**dict.fromkeys(FINE_TUNING, KIND), RECIPE: "finetune"}
        done = store.get(FINE_TUNING[0], "a" * 64, kind=KIND)
        assert (done.state, done.name, done.spec["adapter"]) == ("succeeded", "mine", "mine")
        assert [event.sequence for event in store.events(done.id).items] == [1, 2, 3]
        assert [job.id for job, _ in store.made(KIND, "adapter", ["smollm2"])] == [done.id]
        store.close()
    again = JobStore(database.sqlite_url(file))
    claimed = again.claim([KIND], ["smollm2"])
    assert claimed is not None and claimed.id == FINE_TUNING[1]
    again.close()
    fresh = tmp_path / "fresh.sqlite"
    JobStore(database.sqlite_url(fresh)).close()
    assert tables(file) == tables(fresh) and version(fresh) == NEWEST


def test_a_newer_store_is_refused_by_name_and_left_alone(file: Path) -> None:
    connection = sqlite3.connect(file)
    connection.execute("UPDATE anabranch_schema SET version = 77")
    connection.commit()
    connection.close()
    before = kinds(file)
    expected = rf"jobs\.sqlite has schema version 77.*up to {NEWEST}: update it"
    with pytest.raises(StoreTooNew, match=expected):
        JobStore(database.sqlite_url(file))
    assert (version(file), kinds(file)) == (77, before)


def test_migrations_run_in_order(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def step(number: int) -> Callable[[Connection], None]:
        return lambda connection: seen.append(number)

    monkeypatch.setattr(database, "MIGRATIONS", [step(2), step(3), step(4)])
    JobStore(database.sqlite_url(file)).close()
    assert seen == [2, 3, 4] and version(file) == 4
    monkeypatch.setattr(database, "MIGRATIONS", [step(n) for n in range(2, 7)])
    JobStore(database.sqlite_url(file)).close()
    assert seen == [2, 3, 4, 5, 6]


def test_one_that_fails_leaves_the_old_store(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(connection: Connection) -> None:
        connection.exec_driver_sql("CREATE TABLE half (x INTEGER)")
        connection.exec_driver_sql("SELECT nonsense")

    before = kinds(file), tables(file)
    with monkeypatch.context() as patch:
        patch.setattr(database, "MIGRATIONS", [*MIGRATIONS, broken])
        with pytest.raises(StoreUnusable, match="nonsense"):
            JobStore(database.sqlite_url(file))
    assert (version(file), (kinds(file), tables(file))) == (1, before)


def test_several_processes_that_open_it_at_once_lift_it_once(file: Path) -> None:
    failures: list[BaseException] = []

    def open_it() -> None:
        try:
            JobStore(database.sqlite_url(file)).close()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=open_it) for _ in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not failures and version(file) == NEWEST


def test_who_is_refused_the_switch_to_wal_without_a_wait_tries_again(file: Path) -> None:
    reader = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM jobs").fetchall()
    switching = sqlite3.connect(file, timeout=0)
    try:
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            switching.execute("PRAGMA journal_mode=WAL")
        later = threading.Timer(0.2, reader.execute, ["COMMIT"])
        later.start()
        database.write_ahead(switching)
        later.join()
        assert switching.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    finally:
        switching.close()
        reader.close()


HALF_WAY = """
import sys, time
from anabranch.jobs import JobStore, database

def endless(connection):
    connection.exec_driver_sql("ALTER TABLE jobs ADD COLUMN more INTEGER")
    connection.exec_driver_sql("UPDATE jobs SET more = 1, kind = 'changed'")
    connection.exec_driver_sql("CREATE TABLE half (x INTEGER)")
    print("half way", flush=True)
    time.sleep(600)

database.MIGRATIONS = [*database.MIGRATIONS, endless]
JobStore(sys.argv[1])
"""


def test_kill_9_in_the_middle_leaves_the_old_store(file: Path) -> None:
    before = kinds(file), tables(file)
    command = [sys.executable, "-c", HALF_WAY, database.sqlite_url(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half way\n"
        process.send_signal(signal.SIGKILL)
    assert (version(file), (kinds(file), tables(file))) == (1, before)
    store = JobStore(database.sqlite_url(file))
    assert store.get(FINE_TUNING[0]).kind == KIND and version(file) == NEWEST
    store.close()
