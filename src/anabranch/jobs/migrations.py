"""What lifts a store that an earlier version of the program wrote, one schema version at a time.

The first migration lifts version 1 to 2, and so on: a new one goes to the end, and one that was
released never changes. They are plain SQL, because the tables of :mod:`anabranch.jobs.database`
are those of today. All that a store needs run in one transaction when it is opened, so that it is
old or new and nothing between, whatever happens (on databases whose changes of tables belong to
transactions: SQLite, PostgreSQL).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sqlalchemy import Connection, text

Migration = Callable[[Connection], None]


def name_fine_tuning_apart(connection: Connection) -> None:
    """Jobs beside what is served had the kind that recipes have now; only they have a target."""
    connection.execute(
        text("UPDATE jobs SET kind = 'fine_tuning' WHERE kind = 'finetune' AND target <> ''")
    )


MIGRATIONS: Sequence[Migration] = (name_fine_tuning_apart,)
