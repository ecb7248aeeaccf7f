"""What can go wrong with jobs and files."""

from __future__ import annotations

from anabranch.errors import AnabranchError, ConfigurationError


class UnknownJob(AnabranchError):
    """No job of this id that the caller may see."""

    status = 404
    code = "job_not_found"


class UnknownFile(AnabranchError):
    """No file of this id that the caller may see."""

    status = 404
    code = "file_not_found"


class UnknownArtefact(AnabranchError):
    """The job has made nothing of this name."""

    status = 404
    code = "artifact_not_found"


class ForbiddenTransition(AnabranchError):
    """The job is in a state from which this cannot happen."""

    status = 409
    code = "wrong_state"


class NameTaken(AnabranchError):
    """Another unfinished job makes something of the same name."""

    status = 409
    code = "name_taken"


class FileTooLarge(AnabranchError):
    """The file has more bytes than the store accepts."""

    status = 413
    code = "file_too_large"


class StoreUnusable(ConfigurationError):
    """The job store cannot be opened."""


class StoreTooNew(StoreUnusable):
    """A newer version of this program wrote the store."""
