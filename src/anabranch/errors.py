"""The one exception tree.

Every error that a user can cause is an :class:`AnabranchError`. Its message says what was wrong,
where, and what would be right; the class decides the exit code and the HTTP status, so that the
command line and the server show the same error in their own way.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AnabranchError(Exception):
    """Base of all errors that a user can cause."""

    exit_code = 1
    status = 500
    code: str | None = None


class ConfigurationError(AnabranchError):
    """An option has a value that cannot work."""

    exit_code = 2
    status = 400


class MissingExtra(AnabranchError):
    """A feature needs an optional dependency that is not installed."""

    exit_code = 3

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"this needs the package {package!r}, which is not installed; "
            f"install it with: pip install 'anabranch[{extra}]'"
        )
        self.package = package
        self.extra = extra


class UnknownName(AnabranchError):
    """A plug-in, model or claim that nobody registered."""

    exit_code = 2
    status = 404

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        known = sorted(known)
        hint = did_you_mean(name, known)
        listing = ", ".join(known) if known else "none"
        super().__init__(f"no {kind} named {name!r}{hint}; known: {listing}")
        self.name = name


class ModelError(AnabranchError):
    """A model cannot be found, read or run."""


class ModelNotFound(ModelError):
    """No model of this name, here or where it was looked for."""

    status = 404
    code = "model_not_found"


class ModelCorrupt(ModelError):
    """The files of a model are damaged or incomplete."""


class ModelUnsupported(ModelError):
    """The model is intact, but this engine cannot run its architecture."""


class AdapterError(ConfigurationError):
    """An adapter cannot be built, read, loaded or saved as asked; the model is as it was."""

    code = "invalid_adapter"


class InvalidRequest(AnabranchError, ValueError):
    """A request field has a value that cannot be served.

    ``field`` is the name that the client sent, for example ``"temperature"`` or ``"messages[2]"``.
    """

    exit_code = 2
    status = 400
    code = "invalid_value"

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class RequestTooLong(InvalidRequest):
    """The prompt, or the prompt plus the tokens asked for, exceeds what can be held."""

    code = "context_length_exceeded"


class InvalidConstraint(InvalidRequest):
    """What an answer must look like is not a schema, pattern, grammar or list at all."""

    code = "invalid_constraint"


class UnsupportedConstraint(InvalidConstraint):
    """A keyword or construct that the back-end cannot honour, named with its place."""

    code = "unsupported_constraint"


class UnsatisfiableConstraint(InvalidConstraint):
    """No text at all satisfies it."""

    code = "unsatisfiable_constraint"


class ConstraintTooComplex(InvalidConstraint):
    """Compiling it takes more time or memory than the limits allow."""

    code = "constraint_too_complex"


class QueueFull(AnabranchError):
    """More requests wait than the server was told to hold."""

    status = 429
    code = "queue_full"


class Draining(AnabranchError):
    """The server is shutting down: running requests finish, new ones are refused."""

    status = 503
    code = "draining"


class RequestFailed(AnabranchError):
    """A request that was admitted could not be completed. Other requests are not affected."""

    status = 500
    code = "request_failed"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` for the nearest known name, or an empty string."""
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {nearest[0]!r}?)" if nearest else ""
