"""Long work that outlives a process: what was asked, how far it is, what it left behind.

The store and the files that clients upload belong here. What a job of some kind *does* belongs to
whoever runs that kind; nothing here knows it.
"""

from anabranch.jobs.errors import (
    ForbiddenTransition,
    StoreTooNew,
    UnknownArtefact,
    UnknownFile,
    UnknownJob,
)
from anabranch.jobs.files import FileStore, StoredFile
from anabranch.jobs.records import Artefact, Event, Job, NewEvent, Page, Report
from anabranch.jobs.states import FINISHED, State, allowed
from anabranch.jobs.store import JobStore
from anabranch.jobs.workspace import Workspace

__all__ = [
    "FINISHED",
    "Artefact",
    "Event",
    "FileStore",
    "ForbiddenTransition",
    "Job",
    "JobStore",
    "NewEvent",
    "Page",
    "Report",
    "State",
    "StoreTooNew",
    "StoredFile",
    "UnknownArtefact",
    "UnknownFile",
    "UnknownJob",
    "Workspace",
    "allowed",
]
