"""What can go wrong between a coordinator and sites elsewhere."""

from __future__ import annotations

from anabranch.errors import ConfigurationError
from anabranch.federated.errors import FederationError


class InvitationError(ConfigurationError):
    """A text is no invitation, or not one that can be used like this."""


class NotAllowed(FederationError):
    """The other side refuses: unknown, used, revoked, or somebody else's. Trying again is vain."""

    exit_code = 3
    status = 403
    code = "not_allowed"


class NotKnown(NotAllowed):
    """The token is nobody's."""

    status = 401
    code = "not_known"


class NameTaken(NotAllowed):
    """Another site has this name already."""

    status = 409
    code = "name_taken"


class Refused(FederationError):
    """The coordinator did not take a message; ``status`` is that of its answer."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class CoordinatorGone(FederationError):
    """The coordinator could not be reached for as long as the site is patient."""
